"""Around all answers: headers for browsers, counts, and an end of requests that are answered before they are whole.

Who closes a connection while the other side still writes makes it lose the answer: TCP resets, and what was not read
yet is gone. So a refused body is taken in for a while longer, thrown away, and then the connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxsft.ship.limits import LINGER
from jaxsft.ship.metrics import Metrics
from jaxsft.ship.refusal import GONE, error, unavailable

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
OTHER = "other"  # in the metrics, for all paths that do not exist: strangers could name any number


class Guard:
    """Middleware of ASGI."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str], on_cut: Callable[[], None]):
        """
        Args:
          app: what answers.
          metrics: where requests are counted.
          paths: that exist.
          on_cut: told of each request that the end of the service leaves without an answer.
        """
        self._app, self._metrics, self._paths, self._on_cut = app, metrics, frozenset(paths), on_cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except asyncio.CancelledError:  # the service waits no longer; to raise it again would be logged as a bug
                self._on_cut()
                if not exchange.status:
                    exchange.whole = True  # there is no time left to linger
                    await unavailable("the service has ended").response()(scope, exchange.receive, exchange.send)
            except Exception:
                if not exchange.status:
                    failed = error(500, "the service failed; its log says why")
                    await failed(scope, exchange.receive, exchange.send)
                raise  # for the log
            finally:
                path = scope["path"] if scope["path"] in self._paths else OTHER
                self._metrics.requests.labels(path, str(exchange.status or GONE)).inc()


class Exchange:
    """A request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self._receive, self._send = receive, send
        self._headers: Mapping[bytes, bytes] = dict(scope["headers"])
        length = self._headers.get(b"content-length", b"0").strip()
        # Whether all of the request has come.
        self.whole = length == b"0" and b"transfer-encoding" not in self._headers
        self.status = 0  # of the answer, once it has begun

    async def receive(self) -> Message:
        """The next of the request, noting its end."""
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.whole = True
        return message

    async def send(self, message: Message) -> None:
        """The next of the answer; of a request that is not whole also its end."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": self._with_ours(message.get("headers", []))}
            await self._send(message)
        elif message["type"] == "http.response.body" and not message.get("more_body", False) and not self.whole:
            await self._send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while not self.whole:
                        await self.receive()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self._send(message)

    def _with_ours(self, headers: Any) -> list[tuple[bytes, bytes]]:
        """The answer's headers, and those of HEADERS that it has not."""
        found = {name.lower() for name, _ in headers}
        ours = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items() if k.lower().encode() not in found]
        closing = [] if self.whole else [(b"connection", b"close")]
        return [*headers, *ours, *closing]
