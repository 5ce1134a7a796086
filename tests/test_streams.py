"""What is written reaches a stream that is read, and costs no work where nobody reads it any more."""

from __future__ import annotations

import io
import os
import pty
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

from jaxsft import cli, streams
from tests.commands import python

WORKS = """
import time, warnings
from tqdm import tqdm
def work():
    for i in range(3):
        print('line', i, flush=True)
        cli.say(i)
        cli.warn(i)
        warnings.warn(f'w{i}')
        time.sleep(0.1)
def main():
    with streams.unbreakable_streams():
        thread = threading.Thread(target=work)
        thread.start()
        for _ in tqdm(range(5), disable=False, mininterval=0):
            time.sleep(0.05)
        thread.join()
        sys.stderr.write('x' * 100000)
        print('y' * 100000)
    open(sys.argv[1], 'w').write('done')
cli.run(main)
"""


@pytest.mark.parametrize("shell", ["> >(true) 2> >(true)", "1>&- 2>&-", "2>&-", "2>&1 | head -c 1"])
def test_work_goes_on_when_nobody_reads(shell: str, tmp_path: Path) -> None:
    done = python(WORKS, f"{tmp_path}/done {shell}; exit ${{PIPESTATUS[0]}}")
    assert (tmp_path / "done").read_text() == "done"
    assert done.returncode == 0
    assert done.stderr == ""


def broken_pipe() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def dead_terminal() -> io.TextIOWrapper:
    master, slave = pty.openpty()
    os.close(master)
    return os.fdopen(slave, "w")


def closed_descriptor() -> io.TextIOWrapper:
    stream = broken_pipe()
    os.close(stream.fileno())
    return stream


def closed_file() -> io.TextIOWrapper:
    stream = broken_pipe()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [broken_pipe, dead_terminal, closed_descriptor, closed_file])
def test_unbreakable_streams(make: Callable[[], io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with streams.unbreakable_streams():
        print("x", flush=True)
        print("x" * 100_000)
        cli.say("x")
        cli.warn("x")
        sys.stderr.writelines(["a", "b"])
        thread = threading.Thread(target=lambda: list(tqdm(range(100), disable=False, mininterval=0)))
        thread.start()
        thread.join()
        assert cli.report_error(cli.UserError("a", "b")) == 2
    assert sys.stdout is sys.stderr is stream
    if not stream.closed:
        stream.flush()  # what it held back is gone, too: Python's own flush at the exit would complain
        stream.close()


def test_unbreakable_streams_are_streams(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with streams.unbreakable_streams():
        assert sys.stdout.encoding == before.encoding
        assert sys.stdout.isatty() == before.isatty()
        print("heard")
        with pytest.raises(TypeError):
            sys.stdout.write(1)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "heard\n"


def test_other_errors_of_a_stream_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    with streams.unbreakable_streams(), pytest.raises(OSError, match="No space left"):
        print("x", flush=True)
    streams.discard_output(sys.stdout)
