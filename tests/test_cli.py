"""What the commands write and where: printable lines, JSON, streams that nobody reads, and the list of commands."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jaxsft import __main__ as commands
from jaxsft import cli, output
from tests.commands import python
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain $text\\n", "plain $text\\n"),
        ("\x1b[2Jred\x07\r\n\t\x7f\x9b", r"\x1b[2Jred\x07\r\n\t\x7f\x9b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),  # right to left
        ("\u2028line", r"\u2028line"),
        ("\udcff\udc80.png", r"\udcff\udc80.png"),  # bytes that are no UTF-8
        ("ÄÖß é e\u0301", "ÄÖß é e\u0301"),
        ("猫\u3000犬 ねこ", "猫\u3000犬 ねこ"),
        (
            "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
            "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
        ),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627", "\u0645\u06cc\u200c\u062e\u0648\u0627"),  # Persian
        ("10\u202fkg\xa0", "10\u202fkg\xa0"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert cli.printable(text) == expected


@pytest.mark.parametrize(
    "how", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_an_ascii_terminal(how: dict[str, str]) -> None:
    done = python(
        "def main():\n"
        "    cli.say('caf\\xe9 \\udcff \\U0001f408')\n"
        "    print('caf\\xe9 \\udcff'.replace('\\udcff', ''))\n"
        "    cli.warn('caf\\xe9')\n"
        "    raise cli.UserError('caf\\xe9 \\udcff', 'no')\n"
        "cli.run(main)",
        **how,
    )
    assert done.stdout == "caf\\xe9 \\udcff \\U0001f408\ncaf\\xe9 \n"
    assert done.stderr == "warning: caf\\xe9\nerror: caf\\xe9 \\udcff; no\n"
    assert done.returncode == 2
    # And without `run` around it, as in a library.
    done = python("cli.say('caf\\xe9 \\udcff')", **how)
    assert (done.stdout, done.stderr) == ("caf\\xe9 \\udcff\n", "")


VALUE = {"rows": [1, 0.5, float("nan"), (float("inf"),)], "name": "caf\xe9 \udcff", "none": None}
READ = {"rows": [1, 0.5, None, [None]], "name": "caf\xe9 \udcff", "none": None}


def test_json_file(tmp_path: Path) -> None:
    for name in ("out.json", "x" * 255):
        path = tmp_path / name
        write = output.json_to(str(path))
        assert not path.exists()
        write(VALUE)
        assert json.loads(path.read_text(), parse_constant=pytest.fail) == READ
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
    path.chmod(0o640)
    output.json_to(str(path))([1])
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("[\n  1\n]\n", 0o640)
    assert len(list(tmp_path.iterdir())) == 2
    output.json_to("")(VALUE)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_of_a_link_is_written_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "there" / "target.json"
    link.symlink_to("there/target.json")
    for value in (1, 2):  # a target that is not there yet, and one that is
        output.json_to(str(link))(value)
        assert link.is_symlink()
        assert json.loads(target.read_text()) == value
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link.json", "target.json", "there"]


def test_json_into_a_pipe_and_a_device(tmp_path: Path) -> None:
    path, got = tmp_path / "fifo", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    output.json_to(str(path))([1])
    reader.join(10)
    assert json.loads(got[0]) == [1]
    assert path.is_fifo()
    output.json_to("/dev/null")([1])
    assert Path("/dev/null").is_char_device()
    read, write = os.pipe()
    output.json_to(f"/dev/fd/{write}")([1])
    assert json.loads(os.read(read, 100)) == [1]
    with pytest.raises(cli.UserError, match=r"/dev/full can't be written: No space left on device; "):
        output.json_to("/dev/full")([1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["fifo"]


def test_json_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    write = output.json_to(str(tmp_path / "out.json"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(cli.UserError, match=r"out.json can't be written: No space left on device; name another fi"):
            write(1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "loop").symlink_to("loop")
    for name, cause in (
        ("none/out.json", "No such file or directory"),
        (".", "Is a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("x" * 256, "File name too long"),
    ):
        with pytest.raises(cli.UserError, match=rf"can't be written: {cause}"):
            output.json_to(str(tmp_path / name))(1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["loop"]


MAIN = """
def main():
    write = output.json_to({!r})
    cli.say('a line')
    print('another')
    write([1])
    cli.say('end')
"""


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1"])
def test_json_on_stdout_is_alone_there(name: str, tmp_path: Path) -> None:
    done = python(MAIN.format(name) + "cli.run(main)")
    assert json.loads(done.stdout) == [1]
    assert (done.stderr, done.returncode) == ("a line\nanother\nend\n", 0)
    python(MAIN.format(name) + "cli.run(main)", f"> {tmp_path}/out 2> {tmp_path}/err")
    assert json.loads((tmp_path / "out").read_text()) == [1]


def test_json_on_stderr_keeps_what_is_there(tmp_path: Path) -> None:
    python("cli.warn('x')\noutput.json_to('/dev/stderr')([1])", f"2> {tmp_path}/log")
    assert (tmp_path / "log").read_text() == "warning: x\n[\n  1\n]\n"


def test_run_gives_stdout_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with pytest.raises(SystemExit):
        cli.run(lambda: output.json_to("-")([1]))
    assert sys.stdout is before
    assert capsys.readouterr().out == "[\n  1\n]\n"


PRINTS = "def main():\n    for i in range(100000):\n        {}\n"


@pytest.mark.parametrize(
    "program",
    [
        PRINTS.format("cli.say(i)") + "cli.run(main)",
        PRINTS.format("print(i)") + "cli.run(main)",
        "import time\ndef main():\n    print(flush=True)\n    time.sleep(1)\n    print()\ncli.run(main)",
        "def main():\n    output.json_to('-')(list(range(100000)))\ncli.run(main)",
        "import runpy\nrunpy.run_module('jaxsft', run_name='__main__')",
    ],
)
def test_a_reader_that_leaves_ends_it_quietly(program: str) -> None:
    reads = "true" if "runpy" in program else "head -1"  # which leaves before there is a line, or after the first
    done = python(program, f"| {reads} > /dev/null; exit ${{PIPESTATUS[0]}}")
    assert (done.stderr, done.returncode) == ("", 141)
    if "cli.say(i)" in program:
        unbuffered = python(program, "| head -1; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED="1")
        assert (unbuffered.stdout, unbuffered.stderr, unbuffered.returncode) == ("0\n", "", 141)


def test_a_pipe_of_ours_that_breaks_is_no_reader_that_left() -> None:
    done = python("def main():\n    raise BrokenPipeError('a worker')\ncli.run(main)")
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: a worker\n")


def test_help_into_a_reader_that_leaves() -> None:
    program = "def main():\n    parser = cli.Parser(description='x ' * 100000)\n    parser.parse_args(['--help'])\n"
    done = python(program + "cli.run(main)", "| true")
    assert done.stderr == ""


ABANDONED = """
import asyncio, gc
source = '''
async def work():
    try:
        await asyncio.sleep(9)
    except GeneratorExit:
        raise Exception("left at %s") from None
'''
def main():
    async def fails():
        raise ValueError("of a second array")
    async def both():
        task = asyncio.ensure_future(fails())  # whose exception nobody asks for
        await asyncio.sleep(0.01)
        del task
    for file in ("site-packages/orbax/checkpoint/serialization.py", "jaxsft/ours.py"):
        scope = {"asyncio": asyncio}
        exec(compile(source % file, file, "exec"), scope)
        coroutine = scope["work"]()
        loop = asyncio.new_event_loop()
        task = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.sleep(0))
        del task, coroutine
        loop._ready.clear(), loop._scheduled.clear()
        gc.collect()
    asyncio.run(both())
    gc.collect()
cli.run(main)
"""


def test_what_orbax_abandons_is_not_heard_of() -> None:
    done = python(ABANDONED)
    assert done.returncode == 0
    assert "left at jaxsft/ours.py" in done.stderr
    assert "orbax" not in done.stderr
    assert "never retrieved" not in done.stderr


HELP = "__import__('jaxsft.flags').flags.parse_flags(['--help'], 'usage', {})"


@pytest.mark.parametrize("call", ["cli.say('x')", "print('x')", HELP])
def test_a_full_disk_behind_stdout(call: str) -> None:
    done = python(f"cli.run(lambda: {call})", "> /dev/full")
    expected = "error: the output can't be written: No space left on device; make room, or write it elsewhere\n"
    assert (done.stderr, done.returncode) == (expected, 1)


STREAMS = ["1>&-", "2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-", "2> /dev/full", "1> /dev/full 2> /dev/full", "2> >(true)"]


@pytest.mark.parametrize("shell", STREAMS)
def test_the_status_is_kept_without_stderr(shell: str, tmp_path: Path) -> None:
    fails = "def main():\n    raise cli.UserError('what', 'hint')\n"
    done = python(fails + "cli.run(main)", shell)
    assert done.returncode == 2
    assert done.stdout == ""  # an error never lands among the output
    done = python("threading.Thread(target=lambda: cli.exit_process(cli.Preempted(15, 'a', 'b'))).start()", shell)
    assert done.returncode == 143
    program = (
        f"def main():\n    file = open('{tmp_path}/file', 'wb')\n    os.write(2, b'from C')\n    os.write(1, b'too')\n"
    )
    if "-" in shell:
        assert python(program + "cli.run(main)", shell).returncode == 0
        assert (tmp_path / "file").read_bytes() == b""  # which must not have got the number of stdout or stderr


def test_local_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.local_path("~/a/../b") == Path("/home/me/a/../b")
    assert cli.local_path("runs/~a") == Path("runs/~a")
    for text in ("gs://bucket/run", "s3://bucket", "file:///tmp/a", Path("gs://bucket/run")):
        with pytest.raises(cli.UserError, match="it is no place of this machine; name a file or folder that is"):
            cli.local_path(text)


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["jaxsft", *arguments])
        commands.main()
        said = capsys.readouterr().out.splitlines()
        for name in ("jaxsft.train", "jaxsft.evaluate", "jaxsft.data.show", "jaxsft.parity", "jaxsft.bench", "convert"):
            assert any(line.startswith(f"  python -m {name} ") for line in said)
        assert len(said) == 1 + len(commands.commands())
    assert all(meaning.endswith(".") and len(meaning) > 20 for meaning in commands.commands().values())
    runnable = {
        file for file in [*ROOT.glob("jaxsft/**/*.py"), *ROOT.glob("convert/*.py")] if "cli.run(" in file.read_text()
    }
    assert len(runnable - {ROOT / "jaxsft/__main__.py", ROOT / "jaxsft/cli.py"}) == len(commands.commands())
