"""Processes meet and part though anybody may connect to their port and say anything."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import pytest

from jaxsft.cli import Stop
from jaxsft.run import messages, processes, rendezvous
from jaxsft.run.rendezvous import ProcessInfo, Rendezvous

DEEP = b"[" * 20_000 + b"\n"


def meet(index: int, port: int, into: dict[int, Rendezvous | Stop], count: int = 2, timeout: float = 20) -> None:
    """Come as process `index`; what becomes of it."""
    try:
        into[index] = Rendezvous(ProcessInfo("127.0.0.1", port, count, index), timeout)
    except Stop as stop:
        into[index] = stop


@contextlib.contextmanager
def waiting(timeout: float = 20) -> Iterator[tuple[int, dict[int, Rendezvous | Stop], Callable[[], float]]]:
    """Process 0 of two waits: its port, who has met, and a function that lets process 1 come; the seconds it took."""
    port, met = rendezvous.free_port(), {}
    first = threading.Thread(target=meet, args=(0, port, met), kwargs={"timeout": timeout}, daemon=True)
    first.start()

    def come() -> float:
        began = time.monotonic()
        meet(1, port, met)
        first.join(10)
        return time.monotonic() - began

    yield port, met, come
    for meeting in met.values():
        for connection in meeting._connections.values() if isinstance(meeting, Rendezvous) else ():
            connection.close()


def connect(port: int) -> socket.socket:
    """A connection to process 0, as soon as it listens."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            time.sleep(0.01)


def assert_met(met: dict[int, Rendezvous | Stop]) -> None:
    assert {index: type(meeting) for index, meeting in met.items()} == {0: Rendezvous, 1: Rendezvous}, met
    assert met[0].address == met[0].bind_address == met[1].address  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\x00\n",
        b"\n",
        b"[]\n",
        b"{}\n",
        b'{"index": [1], "count": 2}\n',
        b'{"index": true, "count": 2}\n',
        b'{"index": 1.0, "count": 2}\n',
        b'{"index": -1, "count": 2}\n',
        b'{"index": 1' + b"0" * 100 + b', "count": 2}\n',
        b"x" * 100_000,
        DEEP,
        DEEP[:150] + b"\n",
    ],
    ids=lambda said: repr(said[:24]),
)
def test_what_is_no_handshake_is_rejected(said: bytes) -> None:
    with waiting() as (port, met, come), connect(port) as stranger:
        with contextlib.suppress(ConnectionError):  # sent away before all is said
            stranger.sendall(said)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
        assert come() < 2
        assert_met(met)


def test_one_who_speaks_slowly_holds_up_nobody(monkeypatch) -> None:
    """And is rejected when the time of one handshake is over, however many bytes have come."""
    monkeypatch.setattr(messages, "HANDSHAKE_SECONDS", 1)
    with waiting() as (port, met, come), connect(port) as slow:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 5:
                slow.sendall(b" ")
                time.sleep(0.05)
        assert 0.9 < time.monotonic() - began < 3
        with connect(port) as other:
            other.sendall(b'{"index"')
            assert come() < 0.9
        assert_met(met)


# Connects 1200 times, says nothing, and waits; a line for the connections made.
IDLE = """
import resource, socket, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
idle = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(1200)]
print(len(idle), flush=True)
sys.stdin.read()
"""


def test_a_thousand_who_say_nothing_hold_up_nobody() -> None:
    with waiting() as (port, met, come):
        connect(port).close()
        crowd = subprocess.Popen([sys.executable, "-c", IDLE, str(port)], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)  # fmt: skip
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == b"1200\n"
        assert come() < 2
        crowd.communicate(timeout=20)
        assert_met(met)


def test_where_no_descriptor_is_left_the_first_silent_one_goes() -> None:
    """A server whose accept fails as the system's does once, after three have come."""

    class Server:
        def __init__(self, server: socket.socket):
            self._server, self.calls = server, 0

        def __getattr__(self, name: str):
            return getattr(self._server, name)

        def accept(self):
            self.calls += 1
            if self.calls == 4:
                raise OSError(24, "Too many open files")
            return self._server.accept()

    with socket.create_server(("127.0.0.1", 0)) as real, contextlib.ExitStack() as stack:
        server = Server(real)
        port = real.getsockname()[1]
        idle = [stack.enter_context(connect(port)) for _ in range(3)]
        last = stack.enter_context(connect(port))
        last.sendall(b'{"index": 1, "count": 2}\n')
        deadline = time.monotonic() + 5
        arrivals = messages.accept_handshakes([server], 64, deadline)  # type: ignore[arg-type]
        connection, index, count = next(arrivals)
        assert (index, count) == (1, 2)
        assert server.calls >= 5
        assert idle[0].recv(1) == b""  # sent away
        idle[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            idle[1].recv(1)
        connection.close()
        arrivals.close()


def test_who_does_not_come_is_named_in_time() -> None:
    with waiting(timeout=1) as (port, met, _), connect(port) as idle:
        began = time.monotonic()
        assert idle.recv(1) == b""
        assert time.monotonic() - began < 3
        time.sleep(0.1)
        assert str(met[0]).startswith("of 2 processes 1 did not come within 1 s; start them, and see")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "what answers at .* is not process 0 of a run; see that --coordinator"),
        (DEEP, "what answers at .* is not process 0 of a run"),
        (b'{"port": "1"}\n', "what answers at .* is not process 0 of a run"),
        (b'{"failed": 3}\n', "what answers at .* is not process 0 of a run"),
        (b'{"failed": ["a", "b"]}\n', "^a; b$"),
        (b"", r"process 0 at .* is gone \(the connection ended\); see its messages"),
    ],
)
def test_what_is_not_process_0_is_told(answer: bytes, told: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(Stop, match=told):
            Rendezvous(ProcessInfo("127.0.0.1", server.getsockname()[1], 2, 1), 5)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (DEEP, "process 1 of 2 is gone"),
        (b"{}\n", "process 1 of 2 is gone"),
        (b'{"from": [], "word": "x"}\n', "process 1 of 2 is gone"),
        (b'{"from": 1, "word": ["done"]}\n', "process 1 of 2 is gone"),
        (b"x" * 100_000, "process 1 of 2 is gone"),
        (b"", "process 1 of 2 is gone"),
        (b'{"from": 1, "word": "ended: \\u001b[31m; x"}\n', "process 1 of 2 ended: \x1b[31m; x"),
        (b'{"from": 1, "word": "done"}\n', None),
    ],
)
def test_the_end_of_another_process_is_noticed_whatever_it_says(said: bytes, told: str | None, monkeypatch) -> None:
    left: list[Stop] = []
    monkeypatch.setattr(rendezvous, "exit_process", left.append)
    with waiting() as (_, met, come):
        come()
        assert_met(met)
        meeting, peer = met[0], met[1]._connections[0]  # type: ignore[union-attr]
        assert isinstance(meeting, Rendezvous)
        with contextlib.suppress(ConnectionError):
            peer.sendall(said)
            peer.shutdown(socket.SHUT_WR)
        meeting._await_end(1, meeting._connections[1])
        told_all = [f"{told}; start all again: the same command resumes"] if told else []
        assert [str(stop) for stop in left] == told_all


def test_any_word_is_short_enough_to_be_heard() -> None:
    """A message has room for the longest word in characters that JSON writes with twelve bytes."""
    one, other = socket.socketpair()
    with one, other:
        messages.send(one, {"failed": ["\U0001f600" * messages.MOST_CHARACTERS] * 2})
        assert messages.receive(other, time.monotonic() + 5)["failed"] == ["\U0001f600" * messages.MOST_CHARACTERS] * 2
    assert len(json.dumps("\U0001f600" * messages.MOST_CHARACTERS)) * 2 < messages.LONGEST


class Left(BaseException):
    """In a test, the end of the process."""


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_broken_collective_is_laid_to_the_process_that_broke_it(monkeypatch, wrapped: bool) -> None:
    """Its survivors see the connection break at once; the news of who is gone may come a moment later."""
    told: list[str] = []

    class Peers:
        address = bind_address = "127.0.0.1:1"

        def __init__(self, info: ProcessInfo, timeout: float):
            self.info = info

        def watch(self) -> None:
            threading.Timer(0.1, told.append, ["process 1 is gone"]).start()

        def announce(self, word: str) -> None:
            told.append(word)

    def leave(*_: object) -> None:
        raise Left

    monkeypatch.setattr(processes, "Rendezvous", Peers)
    monkeypatch.setattr(processes, "GRACE", 0.5)
    monkeypatch.setattr(processes, "exit_process", leave)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    values = {"coordinator": "127.0.0.1:1", "num-processes": "3", "process-id": "2"}

    def work() -> None:
        try:
            raise jax.errors.JaxRuntimeError("Gloo: connection closed by peer")
        except jax.errors.JaxRuntimeError:
            if wrapped:
                raise Stop("a checkpoint can't be written", "make room") from None
            raise

    with pytest.raises(Left), processes.join(values, 1):
        work()
    assert [word.partition(":")[0] for word in told] == ["process 1 is gone", "ended"]
