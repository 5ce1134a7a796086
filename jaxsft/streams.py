"""The standard streams of a command: closed before it starts, gone while it runs; and what is kept off them."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # of a stream: nobody reads it any more


def write_text(stream: Any, text: str) -> None:
    """Write `text` and flush; what the stream's encoding lacks is escaped, and a closed one (None) gets nothing."""
    if stream is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def hide_abandoned_work(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`hook` without what becomes of a checkpoint's other arrays where Orbax gives up at the first that fails.

    Their reads and writes are abandoned: collected as garbage at any later time, or finished when their event loop is
    closed. Each would print a traceback, of what has been told in one line.
    """

    def is_abandoned(raised: Any) -> bool:
        code = getattr(raised.object, "cr_code", None)  # of a coroutine
        return "Event loop is closed" in str(raised.exc_value) or (code is not None and "orbax" in code.co_filename)

    return lambda raised: None if is_abandoned(raised) else hook(raised)


def open_closed_streams() -> None:
    """Open /dev/null where a standard stream was closed (`>&-`) before the start.

    Else the next file that is opened gets its number, and with it all that C code writes to stdout or stderr.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (open to the end)


def is_reader_gone(stream: Any) -> bool:
    """Whether the other end of a stream is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return bool(poll.poll(0))  # only errors are reported where none is asked for
    except (OSError, ValueError, AttributeError):
        return False


def flush_or_discard(stream: Any) -> None:
    """Write what a stream holds back; drop it where that can't be, or Python would complain of it at its exit."""
    try:
        stream.flush()
    except (OSError, ValueError):
        discard_output(stream)


def discard_output(stream: Any) -> None:
    """Let all that is still to come on `stream` go nowhere: what it holds back, and what C code writes there, too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        if null != number:
            os.dup2(null, number)
            os.close(null)


class Unbreakable:
    """A text stream whose writes are lost without an error once nobody reads it; in all else that stream."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """See io.TextIOBase."""
        with self._forgiven():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """See io.TextIOBase."""
        self.write("".join(lines))

    def flush(self) -> None:
        """See io.TextIOBase."""
        with self._forgiven():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in GONE:
                raise
            discard_output(self._stream)
        except ValueError:
            if not self._stream.closed:
                raise


@contextlib.contextmanager
def unbreakable_streams() -> Iterator[None]:
    """For a while, let nothing that is written to sys.stdout and sys.stderr fail because a terminal or pipe has gone.

    For work that must outlive the terminal it was started in. All threads are covered, and all that asks sys for its
    stream: print, warnings, tracebacks, progress bars begun inside.
    """
    open_closed_streams()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Unbreakable(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
