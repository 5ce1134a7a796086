"""Commands run in this process, as a user would run them."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

from jaxsft import cli
from tests.conftest import ROOT

START = "import os, sys, threading\nfrom jaxsft import cli, output, streams\n"
PACKAGES = ("parity", "bench")


def run_command(command: str, place: Path) -> tuple[int, str]:
    """The exit status and what stderr got."""
    status, _, said = hear_command(command, place)
    return status, said


def hear_command(command: str, place: Path) -> tuple[int, str, str]:
    """The exit status, what stdout got and what stderr did."""
    name, *arguments = shlex.split(command.replace("@", str(place)))
    module = importlib.import_module(
        {"convert": "convert.__main__"}.get(name, f"jaxsft.{name}" + (".__main__" if name in PACKAGES else ""))
    )
    before, sys.argv = sys.argv, [name, *arguments]
    said, printed = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            cli.run(module.main)
    except SystemExit as end:
        heard = (stream.buffer.getvalue().decode() for stream in (printed, said))  # type: ignore[attr-defined]
        return int(end.code or 0), *heard
    finally:
        sys.argv = before


def assert_refused(command: str, expected: str, place: Path) -> None:
    """Run a command that is wrong: status 2, and the one line `error: EXPECTED`; "..." stands for any end."""
    status, said = run_command(command, place)
    assert said.count("\n") == 1, said
    said, expected = said.removesuffix("\n"), "error: " + expected.replace("@", str(place))
    if expected.endswith("..."):
        assert said.startswith(expected.removesuffix("...")), said
    else:
        assert said == expected
    assert "; " in said
    assert status == 2


def python(program: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with redirections of a shell."""
    environment = {"PYTHONUNBUFFERED": "", **environment}
    command = f'"$0" -c "$1" {shell}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, START + program],
        check=False, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=60,
    )  # fmt: skip
