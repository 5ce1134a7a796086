"""Bring the processes of a run together, and end them together.

JAX connects processes by itself (`jax.distributed`), but ends in a C++ abort after minutes when one of them is missing
or dies. So they first meet here, over one TCP connection from each to process 0: whoever does not come is named. The
connections stay open, and a process that ends without saying that it is done is noticed by all others at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from jaxsft.cli import Preempted, Stop, UserError, leave
from jaxsft.run.messages import WORD, greetings, is_count, receive, send

OPTIONS = {
    "coordinator": "HOST:PORT on which process 0 listens, for a run of several processes",
    "num-processes": "how many processes the run has",
    "process-id": "which of them this is, from 0",
}
PENDING = 64  # connections that have not said yet who they are, besides one for each process
GRACE = 5  # seconds in which the end of a process is heard of by all others
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among those of the run."""

    host: str
    port: int
    count: int
    index: int


@contextlib.contextmanager
def join(values: Mapping[str, str], timeout: int) -> Iterator[None]:
    """Be one of the processes that `values` (of OPTIONS) or the machine's scheduler name; else run alone.

    Raises:
      UserError: the options are incomplete or impossible.
      Stop: a process did not come within `timeout` seconds. Inside: ends this process where another one has ended.
    """
    place = from_options(values) or from_slurm(os.environ)
    if place is None:
        if on_tpu():
            jax.distributed.initialize(initialization_timeout=timeout)
        yield
        return
    if place.count == 1:
        yield
        return
    meeting = Meeting(place, timeout)
    jax.distributed.initialize(meeting.address, place.count, place.index, initialization_timeout=timeout)
    meeting.watch()
    try:
        yield
        jax.distributed.shutdown()
        meeting.say("done")
    except Preempted:  # all processes at the same step
        jax.distributed.shutdown()
        meeting.say("done")
        raise
    except Stop as stop:
        await_news(stop)
        meeting.say(f"ended: {stop}")
        leave(stop)  # without JAX's own ending, which would wait for the others
    except BaseException as error:
        await_news(error)
        try:
            meeting.say(f"ended: {type(error).__name__}")
            traceback.print_exc()
        finally:
            os._exit(1)


def await_news(error: BaseException) -> None:
    """Wait where `error` may come of another process's end, as a collective's does: who hears of it ends this one."""
    if any(isinstance(raised, jax.errors.JaxRuntimeError) for raised in (error, error.__context__)):
        time.sleep(GRACE)


def from_options(values: Mapping[str, str]) -> Place | None:
    """The place that the options give; None where there are none."""
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
    return Place(match[1], int(match[2]), numbers["num-processes"], numbers["process-id"])


def from_slurm(environment: Mapping[str, str]) -> Place | None:
    """The place that `srun` gives; None outside of it. Process 0 is on the first host of the step."""
    if not all(name in environment for name in SLURM):
        return None
    hosts = environment["SLURM_STEP_NODELIST"]  # 'node1', 'node1,node2', 'node[01-04,7],other'
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", hosts)
    if match is None:
        return None
    port = 61440 + int(environment["SLURM_JOB_ID"]) % 4096  # the same for all, another for each job
    host = match[1] + (match[2] or "")
    return Place(host, port, int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"]))


def on_tpu() -> bool:
    """Whether this is a TPU VM and JAX may use it: there JAX finds the other hosts of the slice by itself."""
    wanted = os.environ.get("JAX_PLATFORMS", "") or "tpu"
    return "tpu" in wanted and any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))


class Meeting:
    """The connections between process 0 and the others."""

    def __init__(self, place: Place, timeout: float):
        """Meet within `timeout` seconds. Raises Stop, in every process that came, with the names of those missing."""
        self.place = place
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._connections: dict[int, socket.socket] = {}
        port = self._gather() if place.index == 0 else self._come()
        self.address = f"{place.host}:{port}"
        for connection in self._connections.values():
            connection.settimeout(None)
            keep_alive(connection)

    def _gather(self) -> int:
        """Process 0: wait for all others, then tell them the port of JAX's own service."""
        place, reached = self.place, f"{self.place.host}:{self.place.port}"
        try:
            server = socket.create_server(("", place.port), backlog=place.count + PENDING)
        except OSError as error:
            raise UserError(f"port {place.port} can't be listened on: {error.strerror}", "name another port") from None
        missing = set(range(1, place.count))
        with server, contextlib.closing(greetings(server, place.count + PENDING, self._deadline)) as arrivals:
            for connection, index, count in arrivals:
                self._connections[index if index in missing else -1] = connection
                if count != place.count or index not in missing:
                    self._fail(
                        f"process {index} of {count} has come to process 0 of {place.count}"
                        + (" a second time" if count == place.count else ""),
                        "give every process the same --num-processes and its own --process-id",
                    )
                missing.remove(index)
                if not missing:
                    break
        if missing:
            names = ", ".join(map(str, sorted(missing)))
            self._fail(
                f"of {place.count} processes {names} did not come within {self._timeout:.0f} s",
                f"start them with --process-id {names} and see that they can reach {reached}",
            )
        port = free_port()
        for index, connection in self._connections.items():
            try:
                send(connection, {"port": port})
            except OSError as error:
                self._fail(f"process {index} of {place.count} is gone ({error})", "see its messages")
        return port

    def _fail(self, what: str, what_to_do: str) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                send(connection, {"failed": [what[:WORD], what_to_do[:WORD]]})
        raise Stop(what, what_to_do)

    def _come(self) -> int:
        """The others: go to process 0 and wait until all are there."""
        place = self.place
        while True:
            left = self._deadline - time.monotonic()
            try:
                connection = socket.create_connection((place.host, place.port), timeout=max(left, 0.01))
                break
            except OSError as error:
                if left <= 0:
                    raise Stop(
                        f"process 0 did not answer at {place.host}:{place.port} within {self._timeout:.0f} s ({error})",
                        "start it, and see that this machine can reach it",
                    ) from None
                time.sleep(min(0.2, left))
        try:
            send(connection, {"index": place.index, "count": place.count})
            # Process 0 gives up first, and says for whom it waited.
            answer = receive(connection, time.monotonic() + self._timeout + 10)
        except OSError as error:
            raise Stop(f"process 0 at {place.host}:{place.port} is gone ({error})", "see its messages") from None
        except ValueError:
            answer = {}
        match answer:
            case {"failed": [str(what), str(what_to_do)]}:
                raise Stop(what, what_to_do)
            case {"port": port} if is_count(port):
                self._connections[0] = connection
                return port
        raise Stop(
            f"what answers at {place.host}:{place.port} is not process 0 of a run",
            "see that --coordinator names a port that nothing else uses",
        )

    def say(self, word: str) -> None:
        """Tell the others how this process ends."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                send(connection, {"from": self.place.index, "word": word[:WORD]})

    def watch(self) -> None:
        """From now on end this process when another one ends otherwise than done."""
        for index, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()

    def _listen(self, index: int, connection: socket.socket) -> None:
        try:
            message = receive(connection)
        except (OSError, ValueError):
            message = {}
        match message:
            case {"from": origin, "word": str(word)} if is_count(origin):
                index = origin
            case _:
                word = "is gone"
        if word == "done":
            return
        for other in self._connections.values():  # process 0 passes it on
            if other is not connection:
                with contextlib.suppress(OSError):
                    send(other, {"from": index, "word": word})
        leave(Stop(f"process {index} of {self.place.count} {word}", "start all again: the same command resumes"))


def keep_alive(connection: socket.socket) -> None:
    """Notice within half a minute that the other machine is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
