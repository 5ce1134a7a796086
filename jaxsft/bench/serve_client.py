"""Clients of a service over plain sockets: good ones, and those that send nonsense, too much, slowly or half."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PATIENCE = 60.0  # seconds after which a client gives up
BOUNDARY = b"jaxsft-bench"
CHUNK = 1 << 16  # bytes


class Request(NamedTuple):
    """What a client sends, and what it must hear."""

    kind: str
    head: bytes
    body: bytes
    wanted: tuple[int, ...]  # status; 0: no answer
    pause: float = 0.0  # seconds between the bytes of the body
    sent: int = -1  # bytes after which the client goes; -1: all
    picture: int = -1  # number of the picture that it sends; -1: none


class Outcome(NamedTuple):
    """What a client heard."""

    request: Request
    status: int  # 0: no answer
    answer: Any  # of JSON
    seconds: float
    why: str = ""  # there was no answer

    @property
    def right(self) -> bool:
        """Whether the status is the one that was wanted, with a reason where it is an error."""
        reason = self.status in (0, 200) or bool(isinstance(self.answer, dict) and self.answer.get("error"))
        return self.status in self.request.wanted and reason


def post(kind: str, body: bytes, wanted: tuple[int, ...], content_type: str, headers: str = "", **more: Any) -> Request:
    """A request for classes, with the body's length unless `headers` say that it is in chunks."""
    length = "" if "chunked" in headers else f"Content-Length: {len(body)}\r\n"
    head = f"POST /predict HTTP/1.1\r\nHost: service\r\nContent-Type: {content_type}\r\n{length}{headers}\r\n"
    return Request(kind, head.encode(), body, wanted, **more)


def form(content: bytes, field: str = "file") -> tuple[bytes, str]:
    """A picture as the body of a form, and the body's type."""
    head = (
        f'Content-Disposition: form-data; name="{field}"; filename="../../a<b>.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    )
    body = b"--%b\r\n%b%b\r\n--%b--\r\n" % (BOUNDARY, head.encode(), content, BOUNDARY)
    return body, f"multipart/form-data; boundary={BOUNDARY.decode()}"


def good(contents: Sequence[bytes], as_form: bool) -> list[Request]:
    """A request for each picture."""
    made = []
    for number, content in enumerate(contents):
        body, kind = form(content) if as_form else (content, "application/octet-stream")
        made.append(post("good, form" if as_form else "good, bytes", body, (200,), kind, picture=number))
    return made


def bad(content: bytes, max_bytes: int, timeout: float) -> list[Request]:
    """A request of every kind that can't be answered.

    Args:
      content: of a JPEG.
      max_bytes: of a body.
      timeout: seconds that a body may take.
    """
    raw, large = "application/octet-stream", bytes(max_bytes + 1)
    no_field, of_form = form(content, "picture")
    cut_form = form(content)[0][:-30]
    pause = timeout / 8  # of 40 bytes
    return [
        post("text", b"no picture at all", (400,), raw),
        post("cut picture", content[: len(content) // 2], (400,), raw),
        post("many pixels", png_of(9_000, 9_000), (413,), raw),
        post("bomb", png_of(60_000, 60_000), (413,), raw),
        post("empty", b"", (400,), raw),
        post("other type", b"{}", (415,), "application/json"),
        post("no field", no_field, (422,), of_form),
        post("cut form", cut_form, (400,), of_form),
        post("oversized", large, (413,), raw),
        post("oversized, chunked", chunked(large), (413,), raw, "Transfer-Encoding: chunked\r\n"),
        post("slow body", content[:20] + bytes(20), (408,), raw, pause=pause),
        Request("slow head", b"POST /predict HTTP/1.1\r\nHost: s", b"", (408,)),
        post("cut client", content, (0,), raw, sent=len(content) // 2),
        post("client that does not wait", content, (0,), raw, sent=len(content)),
        Request("no HTTP", b"\x16\x03\x01 GET http\r\n\r\n", b"", (400,)),
    ]


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def chunked(body: bytes) -> bytes:
    """A body in HTTP's chunks."""
    out = io.BytesIO()
    for at in range(0, len(body), CHUNK):
        piece = body[at : at + CHUNK]
        out.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    return out.getvalue() + b"0\r\n\r\n"


class Connection:
    """A connection that is kept for the next request, as long as both sides like."""

    def __init__(self, host: str, port: int):
        self._place = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Request) -> Outcome:
        """Send a request, and hear the answer."""
        began = time.perf_counter()
        fresh = self._streams is None
        try:
            async with asyncio.timeout(PATIENCE):
                status, answer = await self._exchange(request)
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            if not fresh and isinstance(error, OSError | EOFError) and request.sent < 0:
                return await self.ask(request)  # the server had closed it meanwhile, as it may
            return Outcome(request, 0, None, time.perf_counter() - began, str(error) or type(error).__name__)
        return Outcome(request, status, answer, time.perf_counter() - began)

    def close(self) -> None:
        """Go, without a word."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _exchange(self, request: Request) -> tuple[int, Any]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._place)
        reader, writer = self._streams
        writing = asyncio.ensure_future(self._write(writer, request))
        try:
            if request.sent >= 0:
                await writing
                raise EOFError("the client went")
            status, headers, body = await self._read(reader)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        if headers.get(b"connection", b"").lower() == b"close" or not body or status != 200:
            self.close()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, {"error": body.decode(errors="replace")}

    async def _write(self, writer: asyncio.StreamWriter, request: Request) -> None:
        """The request; where the other side has answered and closed, its rest is nobody's."""
        body = request.body if request.sent < 0 else request.body[: request.sent]
        with contextlib.suppress(OSError):
            writer.write(request.head)
            step = 1 if request.pause else CHUNK
            for at in range(0, len(body), step):
                writer.write(body[at : at + step])
                await writer.drain()
                await asyncio.sleep(request.pause)
            await writer.drain()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and body of an answer."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).rstrip().split(b"\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines)}
        body = await (
            reader.readexactly(int(headers[b"content-length"])) if b"content-length" in headers else reader.read()
        )
        return int(first.split()[1]), headers, body


async def load(
    host: str, port: int, requests: Sequence[Request], clients: int, notice: Callable[[int], None] = lambda done: None
) -> list[Outcome]:
    """Send all requests, `clients` at a time; `notice` hears how many are done."""
    waiting, outcomes = iter(requests), list[Outcome]()

    async def client() -> None:
        connection = Connection(host, port)
        for request in waiting:
            outcomes.append(await connection.ask(request))
            notice(len(outcomes))
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes
