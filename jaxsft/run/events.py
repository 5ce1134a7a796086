"""TensorBoard's event files."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class NotHere:
    """An importer's finder to whom a module is not installed, for the thread that made it: no other misses it."""

    def __init__(self, name: str):
        self._name, self._thread = name, threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """See importlib.abc.MetaPathFinder."""
        if name == self._name and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(name)


# tensorboardX imports torch where it is installed, and does without where it is not. Training never loads torch.
sys.meta_path.insert(0, without_torch := NotHere("torch"))
try:
    from tensorboardX.event_file_writer import EventsWriter
finally:
    sys.meta_path.remove(without_torch)
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """A file of scalars."""

    def __init__(self, prefix: Path, step: int):
        """Begin a file whose name starts with `prefix`; what others have of `step` and later ones does not count."""
        # The writer itself, not SummaryWriter: that one hands events to a thread, and waits for ever once it has died
        # of a full disk.
        self._writer = EventsWriter(str(prefix))
        self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, split: str, step: int, now: float, values: Mapping[str, Any]) -> None:
        """Those of `values` that are numbers, as `split/name`; `now` in seconds, as of time.time()."""
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                summary = scalar(f"{split}/{name}", value)
                self._writer.write_event(Event(step=step, wall_time=now, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
