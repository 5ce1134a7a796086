"""What the commands share: the user's errors and their exit status, what is printed, and JSON."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import difflib
import errno
import functools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from jaxsft import streams

FAILED, USER_ERROR = 1, 2  # exit status
STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
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
    """What a user typed for a file or folder: `~` is expanded; argparse's `type` for all of them.

    Raises:
      UserError: it is an address such as gs://bucket/run, not a path of this machine.
    """
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://?", str(text)):
        raise UserError(f"{text} can't be used: {scheme[1]}:// is not known", "name a file or folder of this machine")
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
        sys.stdout = began_with[0]  # `json_to` may have turned it
        for stream in began_with:
            streams.flush_or_discard(stream)
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


def json_to(file: str) -> Callable[[Any], None]:
    """Argparse's `type` for --json, whose default is '': a function that writes a value there as JSON, once.

    For `-` and /dev/stdout it is stdout, and until `run` ends all that is printed goes to stderr, so that a program
    can read the JSON. '' is nowhere.

    Raises:
      UserError: no file can be made there; found now, not after the work.
    """
    if not file:
        return lambda value: None
    if file in STDOUT:
        out, sys.stdout = sys.stdout, sys.stderr
        return lambda value: write_output(out, to_json(value))
    path = local_path(file)
    check_writable(path)
    return functools.partial(write_json, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; see `write_file`."""
    write_file(path, to_json(value).encode())


def check_writable(path: Path) -> None:
    """Raise a UserError where `write_file` could not write, before the work for it; leaves nothing behind."""
    with writing(path) as target:
        if is_stream(path):
            return
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=target.parent):  # tried, not asked: os.access knows nothing of quotas
            pass


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all: what was there is replaced, of a link the file that it names.

    What is no file, such as a device or a pipe, is written to as it is.

    Raises:
      UserError: it can't be written.
    """
    with writing(path) as target:
        if is_stream(path):
            with path.open("ab") as stream:  # nothing is cut off where the stream is a file, as stderr's may be
                stream.write(content)
            return
        partial = target.with_name(f".{os.getpid()}.partial")  # the file's own name may be as long as one can be
        try:
            partial.write_bytes(content)
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """The file that `path` means, links followed; an OSError inside is a UserError about it."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        yield target
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}", "name another file") from None


def is_stream(path: Path) -> bool:
    """Whether `path` is a device, a pipe, or one of this process's open files, rather than a file or nothing yet."""
    opened = str(path) in ("/dev/stdout", "/dev/stderr") or os.path.realpath(path.parent).startswith("/proc/")
    return opened or (path.exists() and not path.is_file() and not path.is_dir())


def to_json(value: Any) -> str:
    """`value` as JSON text; NaN and infinity, which JSON has not, as null."""
    return json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """`value` with None for every float that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
