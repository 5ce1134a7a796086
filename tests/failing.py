"""Sources that fail; what is here is loaded in worker processes, so it imports little."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal

import PIL.Image

from tests.pictures import Pictures


@dataclasses.dataclass(frozen=True)
class Deadly(Pictures):
    """To decode image `at` ends a worker process as the system does that has run out of memory."""

    at: int = 0

    def __getitem__(self, index: int) -> PIL.Image.Image:
        if index == self.at and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@dataclasses.dataclass(frozen=True)
class Raising(Pictures):
    """To decode image `at` raises `error`, by default one that tells of a bug."""

    at: int = 0
    error: Exception | None = None

    def __getitem__(self, index: int) -> PIL.Image.Image:
        if index == self.at:
            raise self.error or RuntimeError("a bug")
        return super().__getitem__(index)
