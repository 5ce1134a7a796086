"""SIGTERM, SIGINT and SIGHUP as a question that the loop asks between steps: must we stop, and do all processes know?

Python runs a signal's handler in the main thread between two bytecodes, and a compilation is a single one that takes
a minute. So the signal wakes a thread of our own, through the descriptor that the C part of the handler writes to.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar

import jax
from jax.experimental import multihost_utils

from jaxsft.cli import Preempted, exit_process
from jaxsft.run.parallel import DataParallel

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(Exception):
    """A signal asks the run to stop, in all its processes at the same step."""

    def __init__(self, number: int, noticed: float):
        """`noticed` is when this process heard of it, of time.monotonic()."""
        super().__init__(signal.Signals(number).name)
        self.number, self.noticed = number, noticed


class Interrupts:
    """To be entered around a loop that calls `poll` at every step, and `defer` once there is something to save.

    Before `defer` a signal ends the process at once, also in the middle of a compilation. After it, the next `poll`
    raises Interrupted; a second SIGINT leaves at once, wherever we are. In a run of several processes, `poll` raises in
    all of them at the same call, one call late: the answer to one call's question is read at the next, so that no
    device waits. JAX's own notice of preemption (`reached_preemption_sync_point`) counts as a SIGTERM, wherever
    `jax.distributed` is initialized. Where the end of the terminal (SIGHUP) was ignored before, as under nohup, it
    stays so.

    In a session of Python (`in_session`) the process is not ours to end. Where a command would end at once, the signal
    goes to whoever answered it before, as if we were not there: Ctrl-C then raises KeyboardInterrupt, in a compilation
    at its end.
    """

    _calls: ClassVar[Iterator[int]] = itertools.count(1)  # of `poll`, in this process

    def __init__(self, parallel: DataParallel, in_session: bool = False):
        self._parallel = parallel
        self._in_session = in_session
        self._deferring = False
        self._received: list[int] = []
        self._before: dict[int, Any] = {}
        self._noticed = float("inf")
        self._asked: jax.Array | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals: the program around us answers them
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        if self._in_session:
            self._before = {number: signal.signal(number, lambda number, frame: self._note(number)) for number in heard}
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._before = {number: signal.signal(number, ignore) for number in heard}
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        if not hasattr(self, "_thread"):
            return
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # ends the thread
        self._thread.join()
        os.close(self._read_end)

    def _give_back(self) -> None:
        """Let those signals be answered by whoever did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def defer(self) -> None:
        """From now on the next `poll` answers a signal, for there is something to save."""
        self._deferring = True

    def poll(self) -> None:
        """Raise Interrupted where this process (of several: any) has been told to stop.

        Every process must call it equally often.
        """
        stop = self._has_notice(next(self._calls)) or bool(self._received)
        if self._parallel.process_count > 1:
            before, self._asked = self._asked, self._parallel.any(stop)
            stop = before is not None and bool(jax.device_get(before))
        if stop:
            noticed = min(self._noticed, time.monotonic())
            raise Interrupted(self._received[0] if self._received else signal.SIGTERM, noticed)

    def _has_notice(self, call: int) -> bool:
        """Whether JAX says so. It does at one call, that after the latest of any process: no number may be left out."""
        if not jax.config.values["jax_enable_preemption_service"]:
            return False
        if has_notice := multihost_utils.reached_preemption_sync_point(call):
            self._noticed = min(self._noticed, time.monotonic())
        return has_notice

    def _listen(self) -> None:
        """The thread: take note of signals as they come."""
        while numbers := os.read(self._read_end, 64):
            for number in numbers:
                self._note(number)

    def _note(self, number: int) -> None:
        if number not in self._before:
            return  # one that the program around us answers
        before = list(self._received)
        self._noticed = min(self._noticed, time.monotonic())
        self._received.append(number)  # before anything is said: there may be nobody left who hears it
        if not self._deferring:
            self._leave(
                Preempted(number, "before the first step", "there was nothing to save, the same command resumes")
            )
        elif number == signal.SIGINT and signal.SIGINT in before:
            self._leave(Preempted(number, "again: left at once", "the same command resumes at the last checkpoint"))
        elif not before:
            hint = ", Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # no stderr any more, or we interrupt a print
                name = signal.Signals(number).name
                print(f"{name}: saving a checkpoint after this step{hint}", file=sys.stderr, flush=True)

    def _leave(self, stop: Preempted) -> None:
        """End the process, or in a session let the signal do what it did before."""
        if not self._in_session:
            exit_process(stop)
        self._give_back()
        signal.raise_signal(stop.number)


def ignore(number: int, frame: FrameType | None) -> Any:
    """The handler in the main thread: the listening thread has the signal already."""
