"""What the commands share: the user's errors and the exit status they end in."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

FAILED, USER_ERROR = 1, 2  # exit status
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


class UserError(Stop):
    """The user's input is wrong: `what` is, and `what_to_do` mends it. Never raised for our own bugs."""

    def __init__(self, what: str, what_to_do: str):
        super().__init__(what, what_to_do, USER_ERROR)


class Preempted(Stop):
    """The command was told to stop by a signal; the status is the shell's for it, 128 + its number."""

    label = "stopped"

    def __init__(self, signal_number: int, where: str, what_to_do: str):
        super().__init__(f"{signal.Signals(signal_number).name} {where}", what_to_do, 128 + signal_number)


def printable(text: object) -> str:
    """`text` as one line without control characters, for names of files and classes are data of strangers.

    Control and format characters (Unicode's Cc, Cf, line separators) and bytes that are no UTF-8 are written as
    escapes: a terminal obeys none of them.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def say(text: object) -> None:
    """Print a line on stdout."""
    print(printable(text), flush=True)


def warn(text: object) -> None:
    """Print `warning: text` as one line on stderr."""
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


def local_path(text: str | Path) -> Path:
    """What a user typed for a file or folder: `~` is expanded; argparse's `type` for all of them.

    Raises:
      UserError: it is an address such as gs://bucket/run, not a path of this machine.
    """
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://?", str(text)):
        raise UserError(f"{text} can't be used: {scheme[1]}:// is not known", "name a file or folder of this machine")
    return Path(text).expanduser()


def complain(stop: Stop) -> int:
    """Print `error: what; what to do` as one line on stderr and return the exit status."""
    print(f"{stop.label}: {printable(' '.join(str(stop).split()))}", file=sys.stderr, flush=True)
    return stop.status


def leave(stop: Stop) -> None:
    """End the process from any thread, without the clean-up that the main thread may be in no state to do."""
    os._exit(complain(stop))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command: 0 when done, a Stop's status with its one line; any other exception keeps its traceback."""
    try:
        status = main() or 0
    except Stop as stop:
        status = complain(stop)
    except KeyboardInterrupt:
        status = complain(Preempted(signal.SIGINT, "before anything was there to save", "nothing is lost"))
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
    which admits a single process is left alone.

    Raises:
      UserError: the one that ended the command.
      RuntimeError: it failed otherwise; the message holds its output.
    """
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    arguments = [sys.executable, "-m", *command]
    with subprocess.Popen(
        arguments, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        said = b""
        while chunk := process.stderr.read1(65536):  # type: ignore[attr-defined]
            said += chunk
            if b"error: " not in said:  # ours to print, once
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
    if process.returncode == USER_ERROR:
        message = said.decode(errors="replace").strip().splitlines()[-1].partition("error: ")[2]
        what, _, what_to_do = " ".join(message.split()).rpartition("; ")
        raise UserError(what, what_to_do)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{said.decode(errors='replace')}")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a JSON file that appears whole or not at all.

    Raises:
      UserError: it can't be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}", "name another file") from None
