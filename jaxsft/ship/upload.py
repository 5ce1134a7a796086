"""The picture in a request: its bytes, or the field "file" of a form, never on disk and under limits as it arrives.

Names of files and types that a client claims are not used: what a picture is, its bytes say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from jaxsft.ship.limits import Limits
from jaxsft.ship.refusal import GONE, Refused, unavailable

FIELD = "file"
MOST_PARTS = 16  # of a form; each costs more than its bytes
RAW = b"application/octet-stream"
FORM = b"multipart/form-data"
HOW = f'send a picture as the form field "{FIELD}", or its bytes as image/* or {RAW.decode()}'
EMPTY = "the body is empty"

# It would tell stderr of forms that are wrong, as often as strangers like.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


class Held:
    """Bytes of bodies in memory, of all requests together."""

    def __init__(self, most: float):
        self.most, self.bytes = most, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Of one request, given back at the end: a function to be told how many bytes more there are.

        It raises Refused (503) where that is too much for all.
        """
        mine = 0

        def add(count: int) -> None:
            nonlocal mine
            if self.bytes + count > self.most:
                raise unavailable("too many pictures are being sent at a time")
            self.bytes += count
            mine += count

        try:
            yield add
        finally:
            self.bytes -= mine


class Reader(Protocol):
    """What takes the chunks of a body."""

    def write(self, chunk: bytes) -> None:
        """Take the next chunk. Raises Refused."""

    def content(self) -> bytes:
        """The picture, after the last chunk. Raises Refused."""


class Raw:
    """The body is the picture."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []

    def write(self, chunk: bytes) -> None:
        """See Reader."""
        self._chunks.append(chunk)

    def content(self) -> bytes:
        """See Reader."""
        content = b"".join(self._chunks)
        if not content:
            raise Refused(400, EMPTY, HOW)
        return content


class Form:
    """The body is multipart/form-data (RFC 7578), of which one part is the picture; others are passed over."""

    def __init__(self, boundary: bytes):
        self._parts = 0
        self._files: list[list[bytes]] = []
        self._header, self._value = b"", b""
        self._taken: list[bytes] | None = None
        self._finished = False
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": self._name,
            "on_header_value": self._says,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError:
            raise Refused(400, "the form's boundary is too long", HOW) from None

    def write(self, chunk: bytes) -> None:
        """See Reader."""
        if self._finished:
            return  # what comes behind a form is no part of it
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise Refused(400, "the form is broken", HOW) from None

    def content(self) -> bytes:
        """See Reader."""
        if not self._finished:
            raise Refused(400, "the form is cut off", HOW)
        if len(self._files) != 1:
            what = f'the form has {len(self._files) or "no"} field{"s" * (len(self._files) > 1)} "{FIELD}"'
            raise Refused(422, what, "send one picture a request, as that field")
        content = b"".join(self._files[0])
        if not content:
            raise Refused(400, f'the field "{FIELD}" is empty', "send a picture as that field")
        return content

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise Refused(400, f"the form has more than {MOST_PARTS} fields", "send one picture a request")

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _says(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            if options.get(b"name") == FIELD.encode():
                self._taken = []
        self._header, self._value = b"", b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._taken is not None:
            self._taken.append(data[start:end])

    def _end(self) -> None:
        if self._taken is not None:
            self._files.append(self._taken)
            self._taken = None

    def _finish(self) -> None:
        self._finished = True


def reader_of(request: Request) -> Reader:
    """What reads a request's body, by its Content-Type. Raises Refused."""
    said = request.headers.get("content-type", "")
    kind, options = parse_options_header(said)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "the body is compressed", "send it as it is")
    if kind == FORM:
        if not options.get(b"boundary"):
            raise Refused(400, "the form names no boundary", "let your HTTP library write its Content-Type")
        return Form(options[b"boundary"])
    if kind == RAW or kind.startswith(b"image/"):
        return Raw()
    what = f"a body of type {kind.decode('latin-1')[:100]!r} is not taken" if kind else "the body has no Content-Type"
    raise Refused(415, what, HOW)


async def receive(request: Request, limits: Limits, add: Callable[[int], None]) -> bytes:
    """The picture in a request's body.

    Args:
      request: whose body nobody has read.
      limits: of its bytes and of its time.
      add: of `Held.share`, told of every chunk.

    Raises:
      Refused: 400 no picture in it, 408 it came too slowly, 413 it is too long, 415 it is of another type, 422 the form
        has no such field, 503 there is no room for it; or the client has gone.
    """
    reader = reader_of(request)
    too_long = Refused(413, f"the body is over {limits.max_bytes / 1e6:g} MB", "send a smaller picture")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise too_long
    received, more = 0, True
    try:
        async with asyncio.timeout(limits.timeout):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Refused(GONE, "the client has gone", "-")
                chunk = message.get("body", b"")
                more = message.get("more_body", False)
                received += len(chunk)
                if received > limits.max_bytes:
                    raise too_long
                add(len(chunk))
                reader.write(chunk)
    except TimeoutError:
        what = f"the body took more than {limits.timeout:g} s to come"
        raise Refused(408, what, "send a smaller picture, or over a faster line") from None
    return reader.content()
