"""What the commands share: the user's errors and their exit status, and what is printed."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import difflib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxsft import streams

FAILED, USER_ERROR = 1, 2  # exit status
DEAF = "compilation"  # the name of threads that a process need not wait for when it ends, and can't stop
OFFLINE = (
    "give local files, --config.model.weights=FILE and --config.data.data_dir=DIR (prepared by TFDS),"
    " or run configs/cifar10.py:sample, which needs no network"
)


class Stop(Exception):
    """A command ends here, through no bug of ours: one line says `what` stopped it and `what_to_do`; no traceback."""

    label = "error"

    def __init__(self, what: str, what_to_do: str, status: int = FAILED):
        super().__init__(f"{what}; {what_to_do}")
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        """How a process sends it to another: as it is, not made anew from its message."""
        return Exception.__new__, (type(self), *self.args), self.__dict__

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback."""
        return [line(self)]


class UserError(Stop):
    """The user's input is wrong: `what` is, and `what_to_do` mends it. Never raised for our own bugs."""

    def __init__(self, what: str, what_to_do: str):
        super().__init__(what, what_to_do, USER_ERROR)


class Preempted(Stop):
    """The command was told to stop by a signal; the status is the shell's for it, 128 + its number."""

    label = "stopped"

    def __init__(self, signal_number: int, where: str, what_to_do: str):
        super().__init__(f"{signal.Signals(signal_number).name} {where}", what_to_do, 128 + signal_number)
        self.number = signal_number


def printable(text: object) -> str:
    """`text` as one line without control characters, for names of files and classes are data of strangers.

    Control and format characters (Unicode's Cc, Cf, line separators) and bytes that are no UTF-8 are written as
    escapes: a terminal obeys none of them. Spaces of all widths are text, and so are the joiners that emoji and scripts
    such as Devanagari are spelt with.
    """
    return "".join(c if is_text(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def is_text(character: str) -> bool:
    """Whether a character is for people, not for a terminal."""
    return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"


def write_output(stream: Any, text: str) -> None:
    """`streams.write_text` on what is a command's output.

    Raises:
      BrokenPipeError: nobody reads it; `run` then ends quietly.
      Stop: it can't be written for another reason, such as a full disk.
    """
    try:
        streams.write_text(stream, text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Stop(f"the output can't be written: {error.strerror}", "make room, or write it elsewhere") from None


def write_stderr(text: str) -> None:
    """`streams.write_text` on stderr, where there still is one."""
    with contextlib.suppress(OSError, ValueError):
        streams.write_text(sys.stderr, text)


def say(text: object) -> None:
    """Print a line on stdout. Raises as `write_output`."""
    write_output(sys.stdout, printable(text) + "\n")


def warn(text: object) -> None:
    """Print `warning: text` as one line on stderr."""
    write_stderr(f"warning: {printable(text)}\n")


def local_path(text: str | Path) -> Path:
    """What a user typed for a file or folder of this machine, as `storage.location` for all others.

    Raises:
      UserError: it is an address such as gs://bucket/run, not a path of this machine.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(text)):
        raise UserError(f"{text} can't be used: it is no place of this machine", "name a file or folder that is")
    return Path(text).expanduser()


def report_error(stop: Stop) -> int:
    """Print `error: what; what to do` as one line on stderr, where that can be, and return the exit status."""
    write_stderr(f"{line(stop)}\n")
    return stop.status


def line(stop: Stop) -> str:
    """`error: what; what to do`, in one line."""
    return f"{stop.label}: {printable(' '.join(str(stop).split()))}"


def exit_process(stop: Stop) -> None:
    """End the process from any thread, without the clean-up that the main thread may be in no state to do."""
    os._exit(report_error(stop))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command: 0 when done, a Stop's status with its one line; any other exception keeps its traceback.

    Where stdout's reader has gone (`| head -1`) it ends without a word in the shell's status for that, 128 + SIGPIPE.
    """
    streams.open_closed_streams()
    sys.unraisablehook = streams.hide_abandoned_work(sys.unraisablehook)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # else it names each abandoned task's exception as an error
    began_with = sys.stdout, sys.stderr
    for stream in began_with:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files are any bytes, and LANG may be C
    try:
        status = main() or 0
        write_output(sys.stdout, "")
    except Stop as stop:
        status = report_error(stop)
    except KeyboardInterrupt:
        status = report_error(Preempted(signal.SIGINT, "before anything was there to save", "nothing is lost"))
    except BrokenPipeError:
        if not any(map(streams.is_reader_gone, began_with)):
            raise
        status = 128 + signal.SIGPIPE
    finally:
        sys.stdout = began_with[0]  # `output.json_to` may have turned it
        for stream in began_with:
            streams.flush_or_discard(stream)
    if any(thread.name == DEAF for thread in threading.enumerate()):
        os._exit(status)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a UserError as any other wrong input."""

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        raise UserError(message, f"see `{self.prog} --help`")


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint for a misspelt name: "did you mean 'resnet18'?", or all the known ones where none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def run_module(*command: str, platform: str = "cpu") -> None:
    """Run `python -m COMMAND...` in a process of its own, its progress on our stderr.

    For what must stay out of this process (torch, TensorFlow). JAX there sees only `platform`, so that an accelerator
    which admits a single process is left alone. It imports from where this process does, whatever folder it is in.

    Raises:
      UserError: the one that ended the command.
      RuntimeError: it failed otherwise; the message holds its output.
    """
    places = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    environment = {**os.environ, "JAX_PLATFORMS": platform, "PYTHONPATH": places}
    arguments = [sys.executable, "-P", "-m", *command]
    with subprocess.Popen(
        arguments, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        said, decoder = b"", codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := process.stderr.read1(65536):  # type: ignore[attr-defined]
            said += chunk
            if b"error: " not in said:  # ours to print, once
                write_stderr(decoder.decode(chunk))
    if process.returncode == USER_ERROR:
        message = said.decode(errors="replace").strip().splitlines()[-1].partition("error: ")[2]
        what, _, what_to_do = " ".join(message.split()).rpartition("; ")
        raise UserError(what, what_to_do)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{said.decode(errors='replace')}")
