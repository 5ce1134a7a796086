"""Messages between the processes of a run, one line of JSON each. Whoever reaches the port may send anything."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Generator, Sequence
from multiprocessing.connection import wait
from typing import Any

HANDSHAKE_SECONDS = 5  # from the connection to the end of its first message
HANDSHAKE_BYTES = 200  # bytes of that, at most
LONGEST = 2**15  # bytes of any other message
Handshakes = Generator[tuple[socket.socket, int, int], None, None]  # connection, index, count
MOST_CHARACTERS = 1000  # characters of a text in one, of which each may take twelve bytes


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Write one message. Raises OSError where the connection has ended."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """Read one message, until `deadline` (of time.monotonic) at most.

    Raises:
      OSError: the connection, or the time, ended before.
      ValueError: it is no message.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("the connection ended")
        line += byte
        if len(line) > LONGEST:
            raise ValueError("too long")
    return parse(line)


def parse(line: bytes | bytearray) -> dict[str, Any]:
    """A message. Raises ValueError where it is none."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def is_count(value: object) -> bool:
    """Whether `value`, a part of a message, is a whole number that can count or number processes."""
    return type(value) is int and 0 <= value < 2**31


def accept_handshakes(servers: Sequence[socket.socket], most: int, deadline: float) -> Handshakes:
    """Accept connections until `deadline` (of time.monotonic); yield those of processes that say which one they are.

    A process's first message gives its index and the number of processes. Connections are read side by side, so that a
    slow one holds up no other. One is closed if its first message is anything else or takes longer than
    HANDSHAKE_SECONDS. If more than `most` are still silent, or no file descriptor is left, the oldest of these is
    closed.
    """
    silent: dict[socket.socket, tuple[float, bytearray]] = {}  # until when, and what it has said so far
    for server in servers:
        server.setblocking(False)

    def reject(connection: socket.socket) -> None:
        del silent[connection]
        connection.close()

    try:
        while (now := time.monotonic()) < deadline:
            for connection in [known for known, (until, _) in silent.items() if until <= now]:
                reject(connection)
            ends = min([deadline, *(until for until, _ in silent.values())])
            for connection in wait([*silent, *servers], ends - now):  # type: ignore[assignment]
                if connection in servers:
                    try:
                        for _ in range(most // 2):  # those who came last are still here when they are heard
                            silent[connection.accept()[0]] = (time.monotonic() + HANDSHAKE_SECONDS, bytearray())
                            if len(silent) > most:
                                reject(next(iter(silent)))
                    except BlockingIOError:
                        pass
                    except OSError:  # no descriptor is left
                        time.sleep(0.01)
                        if silent:
                            reject(next(iter(silent)))
                elif connection in silent:
                    try:
                        if (said := read_handshake(connection, silent[connection][1])) is None:
                            continue
                    except (OSError, ValueError):
                        reject(connection)
                        continue
                    del silent[connection]
                    connection.settimeout(HANDSHAKE_SECONDS)
                    yield connection, *said
    finally:
        for connection in list(silent):
            reject(connection)


def read_handshake(connection: socket.socket, line: bytearray) -> tuple[int, int] | None:
    """Read what has come on a non-blocking connection into `line`: (index, count) once it is whole, None before.

    Raises:
      OSError: the connection has ended.
      ValueError: this is no handshake.
    """
    part = connection.recv(HANDSHAKE_BYTES)
    if not part:
        raise ConnectionError("the connection ended")
    line += part
    if line.endswith(b"\n") and len(line) <= HANDSHAKE_BYTES:
        match parse(line):
            case {"index": index, "count": count} if is_count(index) and is_count(count):
                return index, count
    elif len(line) < HANDSHAKE_BYTES:
        return None
    raise ValueError("not a handshake")
