"""The rendezvous of the processes of a run: all of them meet before JAX connects them, and hear of each other's end.

JAX connects processes by itself (`jax.distributed`), but ends in a C++ abort after minutes when one of them is missing
or dies. So each first opens one TCP connection to process 0, and whoever does not come is named. The connections stay
open: a process that ends without saying that it is done is noticed by all others at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time

from jaxsft.cli import Stop, UserError, exit_process
from jaxsft.run.messages import MOST_CHARACTERS, accept_handshakes, is_count, receive, send
from jaxsft.run.sockets import EVERYWHERE, address, free_port, keep_alive, listen, named_addresses

PENDING = 64  # connections that have not said yet who they are, besides one for each process


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Which of the processes of a run this is, and where process 0 listens."""

    host: str
    port: int
    count: int
    index: int
    devices: tuple[int, ...] | None = None  # of this machine that this process may see; None: all


class Rendezvous:
    """The connections between process 0 and the others."""

    def __init__(self, info: ProcessInfo, timeout: float):
        """Meet within `timeout` seconds.

        Raises:
          Stop: in every process that came; it names those that did not.
        """
        self.info = info
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._connections: dict[int, socket.socket] = {}
        self.bind_address: str | None = None  # where JAX's own service listens, in process 0
        port = self._accept_all() if info.index == 0 else self._connect()
        self.address = address(info.host, port)
        for connection in self._connections.values():
            connection.settimeout(None)
            keep_alive(connection)

    def _accept_all(self) -> int:
        """Process 0: accept all other processes, then tell them the port of JAX's own service."""
        info, reached, most = self.info, address(self.info.host, self.info.port), self.info.count + PENDING
        told = named_addresses(info.host)
        try:
            servers = listen(told or EVERYWHERE, info.port, most)
        except OSError as error:
            raise UserError(f"port {info.port} can't be listened on: {error.strerror}", "name another port") from None
        missing = set(range(1, info.count))
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.enter_context(server)
            arrivals = stack.enter_context(contextlib.closing(accept_handshakes(servers, most, self._deadline)))
            for connection, index, count in arrivals:
                self._connections[index if index in missing else -1] = connection
                if count != info.count or index not in missing:
                    self._fail(
                        f"process {index} of {count} has come to process 0 of {info.count}"
                        + (" a second time" if count == info.count else ""),
                        "give every process the same --num-processes and its own --process-id",
                    )
                missing.remove(index)
                if not missing:
                    break
        if missing:
            names = ", ".join(map(str, sorted(missing)))
            self._fail(
                f"of {info.count} processes {names} did not come within {self._timeout:.0f} s",
                f"start them, and see that they can reach {reached}",
            )
        port = free_port()
        self.bind_address = address(info.host if told else "::", port)
        for index, connection in self._connections.items():
            try:
                send(connection, {"port": port})
            except OSError as error:
                self._fail(f"process {index} of {info.count} is gone ({error})", "see its messages")
        return port

    def _fail(self, what: str, what_to_do: str) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                send(connection, {"failed": [what[:MOST_CHARACTERS], what_to_do[:MOST_CHARACTERS]]})
        raise Stop(what, what_to_do)

    def _connect(self) -> int:
        """The other processes: connect to process 0 and wait until all have."""
        info, reached = self.info, address(self.info.host, self.info.port)
        while True:
            left = self._deadline - time.monotonic()
            try:
                connection = socket.create_connection((info.host, info.port), timeout=max(left, 0.01))
                break
            except OSError as error:
                if left <= 0:
                    raise Stop(
                        f"process 0 did not answer at {reached} within {self._timeout:.0f} s ({error})",
                        "start it, and see that this machine can reach it",
                    ) from None
                time.sleep(min(0.2, left))
        try:
            send(connection, {"index": info.index, "count": info.count})
            # Process 0 gives up first, and says for whom it waited.
            answer = receive(connection, time.monotonic() + self._timeout + 10)
        except OSError as error:
            raise Stop(f"process 0 at {reached} is gone ({error})", "see its messages") from None
        except ValueError:
            answer = {}
        match answer:
            case {"failed": [str(what), str(what_to_do)]}:
                raise Stop(what, what_to_do)
            case {"port": port} if is_count(port):
                self._connections[0] = connection
                return port
        raise Stop(
            f"what answers at {reached} is not process 0 of a run",
            "see that --coordinator names a port that nothing else uses",
        )

    def announce(self, word: str) -> None:
        """Tell the other processes how this one ends."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                send(connection, {"from": self.info.index, "word": word[:MOST_CHARACTERS]})

    def watch(self) -> None:
        """From now on end this process as soon as another one ends without being done."""
        for index, connection in self._connections.items():
            threading.Thread(target=self._await_end, args=(index, connection), daemon=True).start()

    def _await_end(self, index: int, connection: socket.socket) -> None:
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
        exit_process(Stop(f"process {index} of {self.info.count} {word}", "start all again: the same command resumes"))
