"""Files and folders, on this machine or in a bucket: the only file that knows which of them a place is.

What a user types is a `Path` or a `BucketPath`, which have the methods in common that reading takes. What is written
appears whole or not at all: a file is renamed into its place, an object is written at once, and of a folder in a bucket
the file that makes it what it is comes last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxsft import buckets
from jaxsft.buckets import BucketPath
from jaxsft.cli import Stop, UserError

Location = Path | BucketPath
REQUESTS = 16  # to a bucket at the same time


def location(text: str | Path | BucketPath) -> Location:
    """What a user typed for a file or folder: `~` is expanded; argparse's `type` for all that may lie in a bucket.

    Raises:
      UserError: an address of a kind that is not known, or whose extra is not installed.
    """
    if isinstance(text, BucketPath):
        return text
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", str(text)):
        url = str(text).removeprefix(scheme[0]).lstrip("/")  # pathlib makes one slash of two
        return buckets.parse(f"{scheme[1].lower()}://{url}")
    return Path(text).expanduser()


def is_remote(path: str | Location) -> bool:
    """Whether a place is in a bucket."""
    return isinstance(path, BucketPath) or str(path).startswith(tuple(f"{scheme}://" for scheme in buckets.SCHEMES))


@contextlib.contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """`path` itself or, for a while, a copy of the object or folder on this machine, under its name.

    An error of the user's that is raised inside and names the copy speaks of `path`.

    Raises:
      OSError: it can't be had.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jaxsft-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / path.name
        if found := path.walk():
            download(path, copy, found)
        else:
            path.download(copy)
        with speaking_of(path, copy):
            yield copy


@contextlib.contextmanager
def speaking_of(path: Location, copy: Path) -> Iterator[None]:
    """Let a Stop that is raised inside say `path` where it says `copy`."""
    try:
        yield
    except Stop as stop:
        stop.args = (str(stop).replace(str(copy), str(path)), *stop.args[1:])
        raise


def download(source: BucketPath, target: Path, names: Iterable[str]) -> None:
    """Copy objects below `source` to files below `target`. Raises OSError."""

    def fetch(name: str) -> None:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (source / name).download(file)

    at_once(fetch, names)


def at_once(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Call `function` for each name, several at the same time: a request waits for most of its time.

    Raises:
      OSError: one of them did; no other is begun then.
    """
    pool = ThreadPoolExecutor(REQUESTS)
    try:
        for done in [pool.submit(function, name) for name in names]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def mirror(source: BucketPath, target: Path, names: Iterable[str] | None = None) -> None:
    """Let the folder `target` of this machine have all objects below `source`; those of the same size are there.

    Args:
      source: of the bucket.
      target: made where there is none.
      names: not None: these objects alone, those of them that there are.

    Raises:
      OSError: it can't be.
    """
    entries = source.walk()
    if names is not None:
        entries = {name: entries[name] for name in names if name in entries}

    def fetch(name: str) -> None:
        file, changed = target / name, entries[name].changed_ns
        if not file.is_file() or file.stat().st_size != entries[name].size:
            with replacing(file) as partial:
                (source / name).download(partial)
            os.utime(file, ns=(changed, changed))  # the same on every machine

    at_once(fetch, entries)


def upload(source: Path, target: BucketPath, last: str = "") -> None:
    """Copy all files below `source` to objects below `target`, those called `last` as the last. Raises OSError."""
    names = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
    for are_last in (False, True):
        now = [name for name in sorted(names) if (name.split("/")[-1] == last) == are_last]
        at_once(lambda name: (target / name).upload(source / name), now)


@contextlib.contextmanager
def replacing(path: Location) -> Iterator[Path]:
    """A file of this machine to be written, which then takes the place of `path`.

    Raises:
      OSError: it can't be.
    """
    if isinstance(path, BucketPath):
        with tempfile.TemporaryDirectory(prefix="jaxsft-") as folder:
            partial = Path(folder) / path.name
            yield partial
            path.upload(partial)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_file(path: Location) -> Iterator[Path]:
    """A file of this machine to be written, which then appears as `path`.

    Raises:
      UserError: `path` exists or can't be written.
    """
    try:
        if path.exists() or os.path.islink(str(path)):
            raise UserError(f"{path} exists", "name another file or remove it")
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}", "name another file") from None


@contextlib.contextmanager
def new_directory(path: Location, last: str) -> Iterator[Path]:
    """A folder of this machine to be filled, which then appears as `path`; in a bucket its file `last` comes last.

    Raises:
      UserError: `path` exists and is not empty, or can't be written.
    """
    try:
        if (path / last).exists() or (isinstance(path, Path) and path.exists() and is_filled(path)):
            raise UserError(f"{path} exists", "name another directory or remove it")
        parent = None
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            parent = path.parent.resolve()
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=parent))
        try:
            yield partial
            move_directory(partial, path, last)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}", "name another directory") from None


def is_filled(path: Path) -> bool:
    """Whether something that exists is no empty folder."""
    return not path.is_dir() or any(path.iterdir())


def move_directory(source: Path, target: Location, last: str) -> None:
    """Let a folder of this machine be `target`; in a bucket its file `last` comes last. Raises OSError."""
    if isinstance(target, BucketPath):
        upload(source, target, last)
        return
    source.chmod(0o755)  # mkdtemp's is for its user alone
    source.replace(target)


def remove_directory(path: Location) -> None:
    """Remove a folder and all that is in it, as far as that can be."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        at_once(lambda name: (path / name).unlink(missing_ok=True), path.walk())


def length(path: Location) -> int:
    """The bytes of a file. Raises OSError."""
    return path.stat().size if isinstance(path, BucketPath) else path.stat().st_size


def write_file(path: Location, content: bytes) -> None:
    """Write a file that appears whole or not at all: what was there is replaced, of a link the file that it names.

    What is no file, such as a device or a pipe, is written to as it is.

    Raises:
      UserError: it can't be written.
    """
    with writing(path) as target:
        if isinstance(target, BucketPath):
            target.write_bytes(content)
            return
        if is_stream(path):
            with path.open("ab") as stream:  # nothing is cut off where the stream is a file, as stderr's may be
                stream.write(content)
            return
        partial = target.with_name(f".{os.getpid()}.partial")  # the file's own name may be as long as one can be
        try:
            partial.write_bytes(content)
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(path: Location) -> None:
    """Raise a UserError where `write_file` could not write, before the work for it; leaves nothing behind."""
    with writing(path) as target:
        if isinstance(target, BucketPath):
            try_to_write(target.parent)
            return
        if is_stream(path):
            return
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try_to_write(target.parent)


def try_to_write(folder: Location) -> None:
    """Raise an OSError where nothing can be written into `folder`, by writing something: it is gone at once.

    Tried, not asked: os.access says yes to root and knows nothing of quotas, and who may do what in a bucket is not for
    us to read.
    """
    if isinstance(folder, BucketPath):
        probe = folder / f".probe-{os.urandom(4).hex()}"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
        return
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def writing(path: Location) -> Iterator[Location]:
    """The file that `path` means, links followed; an OSError inside is a UserError about it."""
    try:
        if isinstance(path, BucketPath):
            yield path
            return
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        yield target
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}", "name another file") from None


def is_stream(path: Location) -> bool:
    """Whether `path` is a device, a pipe, or one of this process's open files, rather than a file or nothing yet."""
    if isinstance(path, BucketPath):
        return False
    opened = str(path) in ("/dev/stdout", "/dev/stderr") or os.path.realpath(path.parent).startswith("/proc/")
    return opened or (path.exists() and not path.is_file() and not path.is_dir())
