"""Which processes a run has, told by options or by the machine's scheduler, and how they begin and end together."""

from __future__ import annotations

import contextlib
import os
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from jaxsft.cli import Preempted, Stop, UserError, exit_process
from jaxsft.run.rendezvous import ProcessInfo, Rendezvous

OPTIONS = {
    "coordinator": "HOST:PORT on which process 0 listens, for a run of several processes",
    "num-processes": "how many processes the run has",
    "process-id": "which of them this is, from 0",
}
GRACE = 5  # seconds in which the end of a process is heard of by all others
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@contextlib.contextmanager
def join(values: Mapping[str, str], timeout: int) -> Iterator[None]:
    """Be one of the processes that `values` (of OPTIONS) or the machine's scheduler name; else run alone.

    Raises:
      UserError: the options are incomplete or impossible.
      Stop: a process did not come within `timeout` seconds. Inside: ends this process where another one has ended.
    """
    info = from_options(values) or from_slurm(os.environ)
    if info is None:
        if on_tpu():
            jax.distributed.initialize(initialization_timeout=timeout)
        yield
        return
    if info.count == 1:
        yield
        return
    rendezvous = Rendezvous(info, timeout)
    jax.distributed.initialize(rendezvous.address, info.count, info.index, initialization_timeout=timeout)
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
    return ProcessInfo(match[1], int(match[2]), numbers["num-processes"], numbers["process-id"])


def from_slurm(environment: Mapping[str, str]) -> ProcessInfo | None:
    """What `srun` says of the processes; None outside of it. Process 0 is on the first host of the step."""
    if not all(name in environment for name in SLURM):
        return None
    hosts = environment["SLURM_STEP_NODELIST"]  # 'node1', 'node1,node2', 'node[01-04,7],other'
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", hosts)
    if match is None:
        return None
    port = 61440 + int(environment["SLURM_JOB_ID"]) % 4096  # the same for all, another for each job
    host = match[1] + (match[2] or "")
    return ProcessInfo(host, port, int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"]))


def on_tpu() -> bool:
    """Whether this is a TPU VM and JAX may use it: there JAX finds the other hosts of the slice by itself."""
    wanted = os.environ.get("JAX_PLATFORMS", "") or "tpu"
    return "tpu" in wanted and any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
