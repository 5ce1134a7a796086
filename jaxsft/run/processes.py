"""Which processes a run has, told by options or found by JAX, and how they begin and end together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping

import jax

from jaxsft.cli import Preempted, Stop, UserError, exit_process, say
from jaxsft.run import clusters
from jaxsft.run.rendezvous import ProcessInfo, Rendezvous

OPTIONS = {
    "coordinator": "HOST:PORT on which process 0 listens, for a run of several processes",
    "num-processes": "how many processes the run has",
    "process-id": "which of them this is, from 0",
}
GRACE = 5  # seconds in which the end of a process is heard of by all others


@contextlib.contextmanager
def join(values: Mapping[str, str], timeout: int) -> Iterator[None]:
    """Be one of the processes that `values` (of OPTIONS) or the cluster around us name; else run alone.

    Raises:
      UserError: the options are incomplete or impossible.
      Stop: a process did not come within `timeout` seconds. Inside: ends this process where another one has ended.
    """
    try:
        info = from_options(values) or clusters.find(timeout)
    except clusters.Unknown:  # then JAX finds the cluster and connects by itself, and names nobody who is missing
        with contextlib.suppress(ValueError):  # there is none
            jax.distributed.initialize(initialization_timeout=timeout)
        yield
        return
    if info is None and clusters.on_tpu():
        say("one process, no cluster found: training alone on this machine's devices")
    if info is None or info.count == 1:
        yield
        return
    rendezvous = Rendezvous(info, timeout)
    connect(rendezvous, timeout)
    rendezvous.watch()
    try:
        yield
        jax.distributed.shutdown()
        rendezvous.announce("done")
    except Preempted:  # all processes at the same step
        jax.distributed.shutdown()
        rendezvous.announce("done")
        raise
    except Stop as stop:
        wait_for_news(stop)
        rendezvous.announce(f"ended: {stop}")
        exit_process(stop)  # without JAX's own ending, which would wait for the others
    except BaseException as error:
        wait_for_news(error)
        try:
            rendezvous.announce(f"ended: {type(error).__name__}")
            traceback.print_exc()
        finally:
            os._exit(1)


def connect(rendezvous: Rendezvous, timeout: int) -> None:
    """Connect JAX with the processes that have met."""
    info = rendezvous.info
    jax.distributed.initialize(
        rendezvous.address,
        info.count,
        info.index,
        info.devices,
        cluster_detection_method="deactivate",  # what it would find is known, or not to be asked
        initialization_timeout=timeout,
        coordinator_bind_address=rendezvous.bind_address,
    )
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        # Python's again: JAX's only takes a note, and until the loop runs there would be nobody who reads it.
        signal.signal(signal.SIGTERM, handler)


def wait_for_news(error: BaseException) -> None:
    """Wait where `error` may come of another process's end, as a collective's does: who hears of it ends this one."""
    if any(isinstance(raised, jax.errors.JaxRuntimeError) for raised in (error, error.__context__)):
        time.sleep(GRACE)


def from_options(values: Mapping[str, str]) -> ProcessInfo | None:
    """What the options say of the processes; None where they say nothing."""
    given = {name: values.get(name, "") for name in OPTIONS}
    if not any(given.values()):
        return None
    missing = [f"--{name}" for name, value in given.items() if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)} not given", "give all of --" + ", --".join(OPTIONS))
    match = re.fullmatch(r"\[?([^\[\]\s]+)\]?:(\d{1,5})", given["coordinator"])
    if not match or not 0 < int(match[2]) < 65536:
        raise UserError(f"--coordinator is {given['coordinator']!r}", "it must be HOST:PORT of process 0")
    numbers = {}
    for name in ("num-processes", "process-id"):
        if not given[name].isdecimal():
            raise UserError(f"--{name} is {given[name]!r}", "it must be a whole number")
        numbers[name] = int(given[name])
    if numbers["process-id"] >= numbers["num-processes"]:
        raise UserError(
            f"--process-id is {numbers['process-id']} of {numbers['num-processes']} processes", "they count from 0"
        )
    kind = clusters.launcher()
    devices = kind and clusters.local_devices(kind)
    return ProcessInfo(match[1], int(match[2]), numbers["num-processes"], numbers["process-id"], devices)
