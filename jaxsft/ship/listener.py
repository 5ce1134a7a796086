"""uvicorn as this program runs it: a socket bound first, clients that never finish a header, an end without a trace."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxsft.cli import UserError
from jaxsft.ship.limits import CONNECTIONS, Limits
from jaxsft.ship.refusal import BUSY

BACKLOG = 512  # connections that the system takes for us before we do


def bind(host: str, port: int, timeout: float = 0.0) -> socket.socket:
    """A socket that listens, so that nobody else can take the port while the model loads.

    Args:
      host: an address of this machine, or a name of one.
      port: 0: a free one.
      timeout: seconds after which the system drops a client that takes nothing of its answer, where it can (Linux); 0:
        never.

    Raises:
      UserError: another program has the port, or the address is none of this machine's.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {port}", "it must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        what = f"--host {host} is no address: {getattr(error, 'strerror', None) or error}"
        raise UserError(what, "name one of this machine, such as 127.0.0.1") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if timeout and hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(int(1000 * timeout), 1))
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        what = f"{host} port {port} can't be listened on: {error.strerror}"
        raise UserError(what, "name another --port or --host") from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def raw_answer(status: str, said: str, headers: str = "") -> bytes:
    """An answer where there is no request to be answered."""
    body = f'{{"error":"{said}"}}'
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


TOO_MANY = raw_answer("503 Service Unavailable", "too many clients; try again later", f"Retry-After: {BUSY}\r\n")
TOO_SLOW = raw_answer("408 Request Timeout", "the head of the request took too long; send it at once")


def protocol_of(timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, which by itself waits for the head of a request for ever, and for any number of clients.

    Args:
      timeout: seconds that a head may take, from the connection or its first byte on.
    """

    class Patient(H11Protocol):
        """A connection."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """See asyncio.Protocol."""
            super().connection_made(transport)
            if len(self.connections) > CONNECTIONS:
                transport.write(TOO_MANY)
                transport.close()
            else:
                self.watch()

        def data_received(self, data: bytes) -> None:
            """See asyncio.Protocol."""
            super().data_received(data)
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            """See asyncio.Protocol."""
            self.stop_watching()
            super().connection_lost(exc)

        def watch(self) -> None:
            """Count the time where a head is due, and only there."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_watching()
            elif self.timer is None and not self.transport.is_closing():
                self.timer = self.loop.call_later(timeout, self.give_up)

        def stop_watching(self) -> None:
            """A request has come, or the client has gone."""
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def give_up(self) -> None:
            """The time is over."""
            if not self.transport.is_closing():
                self.transport.write(TOO_SLOW)
                self.transport.close()

    return Patient


class Server(uvicorn.Server):
    """uvicorn, but SIGTERM and SIGINT end it with status 0: what was in flight is answered, nothing went wrong."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
        super().__init__(config)
        self.should_exit = self.force_exit = False
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; at a second signal end at once. Not uvicorn's own, which raises the signal again at the end."""
        self._on_signal()
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(application: Any, limits: Limits, on_signal: Callable[[], None]) -> Server:
    """What `run(sockets=[...])` serves an application with."""
    config = uvicorn.Config(
        application,
        http=protocol_of(limits.timeout),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=limits.graceful,
    )
    return Server(config, on_signal)
