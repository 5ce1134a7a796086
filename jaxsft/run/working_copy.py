"""A workdir as a run writes to it: the folder itself, or of one in a bucket a copy on this machine that is sent there.

A bucket has no append and no rename, so a run never writes there as to a disk. It works in a folder of this machine,
and what has changed is sent at each checkpoint and evaluation and every INTERVAL seconds, in an order that leaves a run
resumable wherever it is cut off: first what may be ahead of the checkpoints (metrics, events; later lines are cut when
a run resumes), then new checkpoints, of each the object COMMITTED last, and only then older ones are removed, of each
that object first. A bucket that is away for a while delays the next checkpoint and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO

from jaxsft import storage
from jaxsft.buckets import BucketPath
from jaxsft.cli import Stop, UserError, warn
from jaxsft.run.lease import Lease
from jaxsft.storage import Location

FOLDER = "checkpoints"
COMMITTED = "commit_success.txt"  # Orbax's own name for the object that makes a checkpoint in a bucket whole
LOCK = "lock"
LATER = ("report.html", "MODEL_CARD.md")  # made of all the rest
INTERVAL = 30.0  # seconds
SCRATCH, IN_USE = "jaxsft-workdir-", "in_use"


class WorkingCopy:
    """Where a run writes (`path`) and where that is kept (`place`); to be entered."""

    def __init__(self, place: Location, sends: bool = True, lease: Lease | None = None):
        """Of a workdir. One process of a run `sends`, and holds the `lease`; the others only read.

        Raises:
          UserError: a bucket can't be read, or there is no room for a copy.
        """
        self.place = place
        self._lease = lease
        if isinstance(place, Path):
            self.path = place
            return
        self._sends = sends
        self._sent: dict[str, tuple[int, int]] = {}  # name -> (bytes, ns) of the file as it was sent
        self._there: set[int] = set()  # the steps whose checkpoints are in the bucket
        self._lock, self._ended = threading.Lock(), threading.Event()
        with contextlib.ExitStack() as undo:
            try:
                self._scratch, self._in_use = scratch()
                undo.callback(shutil.rmtree, self._scratch, ignore_errors=True)
                self.path, self._outgoing = self._scratch / "copy" / place.name, self._scratch / "outgoing"
                self.path.mkdir(parents=True)
                self._outgoing.mkdir()
                self._fetch(place)
            except OSError as error:
                what = f"{place} can't be copied to this machine: {error.strerror}"
                raise UserError(what, "make room in the temporary folder, or give another --workdir") from None
            undo.pop_all()

    def _fetch(self, place: BucketPath) -> None:
        """Bring here what a run needs of its past; what a send that was cut off has left is removed."""
        found = place.walk()
        steps_found = {name.split("/")[1] for name in found if name.startswith(f"{FOLDER}/")}
        whole = {step for step in steps_found if f"{FOLDER}/{step}/{COMMITTED}" in found}
        files = [name for name in found if "/" not in name and not name.startswith((".", LOCK))]
        parts = [name for name in found if name.startswith(f"{FOLDER}/")]
        wanted = [name for name in parts if name.split("/")[1] in whole]
        storage.download(place, self.path, [*files, *wanted])
        self._sent = {name: stamp(self.path / name) for name in files}
        if self._sends:
            storage.at_once(lambda name: (place / name).unlink(missing_ok=True), set(parts).difference(wanted))
        self._there = {int(step) for step in whole if step.isdecimal()}

    def flush(self) -> None:
        """Send what has changed, and return when all is there.

        Raises:
          Stop: it can't be written, or another run has taken the workdir over.
        """
        if isinstance(self.place, BucketPath) and self._sends:
            if self._lease:
                self._lease.check()
            try:
                with self._lock:
                    self._send(self.place)
            except OSError as error:
                what = f"{self.place} can't be written: {error.strerror}; what is not there lies in {self.path}"
                raise Stop(what, "mend that; the same command then resumes") from error

    def _send(self, place: BucketPath) -> None:
        here = steps(self.path)  # before the metrics, which then hold all lines up to the last of these
        files = self._files()
        for name in sorted(files, key=lambda name: (name in LATER, name)):
            mark = stamp(self.path / name)
            if self._sent.get(name) != mark:
                as_it_is = Path(shutil.copy(self.path / name, self._outgoing))  # it may grow while it is sent
                (place / name).upload(as_it_is)
                as_it_is.unlink()
                self._sent[name] = mark
        for step in here:
            if step not in self._there:
                folder = Path(FOLDER) / str(step)
                (self.path / folder / COMMITTED).touch()  # on a disk only some versions of Orbax write it
                storage.upload(self.path / folder, place / folder.as_posix(), last=COMMITTED)
                self._there.add(step)
        for step in sorted(self._there - set(steps(self.path))):
            self._remove(place / FOLDER / str(step))
            self._there.discard(step)
        for name in self._sent.keys() - files:
            (place / name).unlink(missing_ok=True)
            del self._sent[name]

    def _files(self) -> set[str]:
        """The names of all files but checkpoints and what is not whole yet."""
        found = (file.relative_to(self.path) for file in self.path.rglob("*") if file.is_file())
        return {file.as_posix() for file in found if file.parts[0] != FOLDER and file.suffix != ".partial"}

    def _remove(self, checkpoint: BucketPath) -> None:
        """Remove a checkpoint from the bucket; from the first object on it is none."""
        (checkpoint / COMMITTED).unlink(missing_ok=True)
        storage.at_once(lambda name: (checkpoint / name).unlink(missing_ok=True), checkpoint.walk())

    def _send_now_and_then(self) -> None:
        """The thread: a new checkpoint is sent at once, all else every INTERVAL seconds."""
        waited = 0.0
        while not self._ended.wait(0.5):
            waited += 0.5
            if waited >= INTERVAL or not self._there.issuperset(steps(self.path)):
                with contextlib.suppress(Stop, OSError):  # the next `flush` tries again, and tells
                    self.flush()
                waited = 0.0

    def __enter__(self) -> WorkingCopy:
        if isinstance(self.place, BucketPath) and self._sends:
            self._thread = threading.Thread(target=self._send_now_and_then, name="bucket", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self.place, Path):
            return
        with self._in_use:  # to the end: a copy that nobody holds is removed by the next run that starts
            if self._sends:
                self._ended.set()
                self._thread.join()
                try:
                    self.flush()
                except Stop as stop:
                    (self._scratch / IN_USE).unlink()  # what is not in the bucket stays
                    if kind is None:
                        raise
                    if str(stop) != str(error):
                        warn(stop)
                    return
            shutil.rmtree(self._scratch, ignore_errors=True)


def steps(workdir: Location) -> list[int]:
    """The steps that have a whole checkpoint, oldest first.

    Raises:
      UserError: the bucket does not say.
    """
    try:
        return sorted(int(p.name) for p in (workdir / FOLDER).iterdir() if p.name.isdecimal() and is_whole(p))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{workdir / FOLDER} can't be read: {error.strerror}", "make it readable") from None


def is_whole(checkpoint: Location) -> bool:
    """Whether it is all there: a folder, which got its name in the end, or in a bucket one with the last object."""
    return checkpoint.is_dir() if isinstance(checkpoint, Path) else (checkpoint / COMMITTED).is_file()


def stamp(file: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def scratch() -> tuple[Path, IO[str]]:
    """A new folder of this machine for a working copy, and the file whose lock says that it is in use.

    Those of processes that were killed are removed.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError), (left / IN_USE).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=SCRATCH))
    file = (path / IN_USE).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return path, file
