"""The lock of a workdir in a bucket, which has no locks: an object that is made only where there is none.

WORKDIR/lock.N says who holds it, and is written anew every BEAT seconds. One that has not been for DEAD seconds belongs
to a machine that is gone (a spot VM says no farewell); on this machine a process that has ended is known at once. The
next run then makes lock.N+1, and of several who try one succeeds. A run that was only asleep sees it and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from jaxsft.buckets import BucketPath
from jaxsft.cli import Stop, UserError, warn

BEAT = 15.0  # seconds
DEAD = 120.0  # seconds; a bucket that is away for a minute takes nobody's lock
NAME = "lock."


class Lease:
    """The lock of `workdir`, ours; to be entered. Its end frees the workdir."""

    def __init__(self, workdir: BucketPath):
        """Take it, or wait until it is known whether its owner lives: DEAD seconds at most.

        Raises:
          UserError: its owner lives, or the bucket can't be written.
        """
        self.workdir = workdir
        self._me = {**this_process(), "token": secrets.token_hex(8)}
        self.lost = False
        self._ended = threading.Event()
        try:
            while not self._take():
                pass
        except OSError as error:
            raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _take(self) -> bool:
        """Try once; whether it is ours."""
        found = numbers(self.workdir)
        if found:
            await_death(self.workdir, found[-1])
        self._number = (found[-1] if found else 0) + 1
        if not self._path.create(self._content()):
            return False
        for number in found:
            (self.workdir / f"{NAME}{number}").unlink(missing_ok=True)
        if numbers(self.workdir)[-1] > self._number:  # who saw fewer of them was first
            self._path.unlink(missing_ok=True)
            return False
        return True

    @property
    def _path(self) -> BucketPath:
        return self.workdir / f"{NAME}{self._number}"

    def _content(self) -> bytes:
        return json.dumps({**self._me, "time": time.time()}).encode()

    def _beat(self) -> None:
        """The thread: write the lock anew for as long as it is ours."""
        while not self.lost and not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a bucket that does not answer takes nobody's lock
                self.lost = numbers(self.workdir)[-1:] != [self._number]
                if not self.lost and not self._ended.is_set():
                    self._path.write_bytes(self._content())

    def check(self) -> None:
        """Raise a Stop where the workdir is no longer ours."""
        if self.lost:
            raise Stop(
                f"{self.workdir} was taken over by another run, for of this one nothing was heard for {DEAD:.0f} s",
                "see what that one does; only one run can be in a workdir",
            )

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # then it dies by itself
            if not self.lost:
                self._path.unlink(missing_ok=True)


def numbers(workdir: BucketPath) -> list[int]:
    """The numbers of the locks that are there, in their order."""
    try:
        endings = [path.name.removeprefix(NAME) for path in workdir.iterdir() if path.name.startswith(NAME)]
    except FileNotFoundError:
        return []
    return sorted(int(ending) for ending in endings if ending.isdecimal())


def await_death(workdir: BucketPath, number: int) -> None:
    """Return when the owner of a lock is known to be gone. Raises UserError where it is known to live."""
    path, since = workdir / f"{NAME}{number}", time.monotonic()
    owner, first = {}, None
    while True:
        try:
            found = path.stat().changed_ns, path.read_bytes()
        except FileNotFoundError:
            return  # it has ended
        with contextlib.suppress(ValueError):
            owner = json.loads(found[1])
        owner = owner if isinstance(owner, dict) else {}
        lives = is_alive(owner)
        if lives is None and first not in (None, found):
            lives = True
        if lives:
            whose = f"process {owner.get('process')} on {owner.get('host')}"
            raise UserError(f"{workdir} is in use by {whose}", "wait for it, or give another --workdir")
        silent = max(time.time() - found[0] / 1e9, time.monotonic() - since)
        if lives is False or silent > DEAD:
            return
        if first is None:
            whose = f"process {owner.get('process')} on {owner.get('host')}"
            warn(f"{workdir} was held by {whose} {silent:.0f} s ago: its lock is taken over at {DEAD:.0f} s")
            first = found
        time.sleep(min(1.0, DEAD / 10))


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the owner of a lock lives, where it is a process of this machine; else None."""
    me = this_process()
    if any(owner.get(key) != me[key] for key in ("host", "boot", "namespace")):
        return None
    return started(owner.get("process")) == owner.get("started")


def this_process() -> dict[str, Any]:
    """What tells this process from all others, of other machines and other times too."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "boot": boot,
        "namespace": namespace,
        "started": started(os.getpid()),
    }


def started(process: Any) -> str:
    """When a process of this machine began, in the kernel's ticks; '' where there is none."""
    try:
        return Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return ""
