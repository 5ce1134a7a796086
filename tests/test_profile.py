"""--profile: some steps are traced, whatever becomes of the run, and never to its harm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxsft import train
from jaxsft.run.profile import SKIPPED, Profile, steps_of
from jaxsft.run.working_copy import WorkingCopy


def loop(workdir: Path, steps: int, calls: int, a_call: int = 1, fails_at: int | None = None) -> None:
    """A loop of `calls` calls, each of `a_call` updates."""
    job: Any = SimpleNamespace(parallel=SimpleNamespace(process_count=1, is_main=True), state=jnp.zeros(2))
    with Profile(job, WorkingCopy(workdir), steps) as profile:
        for number in range(calls):
            with profile.call(range(number * a_call + 1, (number + 1) * a_call + 1)):
                job.state = job.state + 1
                if number == fails_at:
                    raise KeyboardInterrupt


def traced(workdir: Path) -> list[str]:
    """The steps that the trace names, in order."""
    (file,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
    (host,) = (plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes if plane.name == "/host:CPU")
    events = [event for line in host.lines for event in line.events if event.name == "train"]
    return [str(dict(event.stats)["step_num"]) for event in sorted(events, key=lambda event: event.start_ns)]


# updates asked for, calls of the loop, updates of each, the call that fails -> updates named in the trace
LOOPS = {
    "as asked": (2, 9, 1, None, ["4", "5"]),
    "several a call": (3, 9, 2, None, ["8", "10"]),
    "the run ends before": (9, SKIPPED + 2, 1, None, ["4", "5"]),
    "a signal comes": (9, 9, 1, 5, ["4", "5", "6"]),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_steps_after_compilation_are_traced(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, calls, a_call, fails_at, expected = LOOPS[name]
    try:
        loop(tmp_path, steps, calls, a_call, fails_at)
    except KeyboardInterrupt:
        assert fails_at is not None
    assert traced(tmp_path) == expected
    memory = tmp_path / "profile" / "memory.prof"
    assert memory.read_bytes()[:2] == b"\x1f\x8b"  # gzip, as pprof wants it
    said = capsys.readouterr()
    count = a_call * len(expected) - (fails_at is not None)
    assert said.out == (
        f"traced {count} steps: xprof --logdir {memory.parent} --port 8791 (pip install xprof)\n"
        f"their memory: pprof --web {memory} (go install github.com/google/pprof@latest)\n"
    )
    assert said.err == ""


def test_without_steps_nothing_is_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop(tmp_path, 0, 9)
    assert (capsys.readouterr(), list(tmp_path.iterdir())) == (("", ""), [])
    loop(tmp_path, 2, SKIPPED)
    assert capsys.readouterr().err == "warning: the run ended before anything was traced for --profile\n"
    assert not any(tmp_path.iterdir())


def test_a_profile_that_fails_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with jax.profiler.trace(tmp_path / "other"):  # of which there can be one at a time
        loop(tmp_path, 2, 9)
    assert capsys.readouterr().err.startswith("warning: no profile could be made: RuntimeError: ")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file")
    loop(tmp_path / "run", 2, 9)
    said = capsys.readouterr()
    assert said.err.startswith("warning: no profile could be made: ")
    assert (said.err.count("\n"), said.out) == (1, "")
    with jax.profiler.trace(tmp_path / "next"):
        pass  # the failed one is over


def test_the_command_takes_a_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(train, "train", lambda config, workdir, profile: found.append(profile))
    for more in ([], ["--profile", "12"]):
        monkeypatch.setattr("sys.argv", ["train", "--config=tests/small.py", f"--workdir={tmp_path}/run", *more])
        train.main()
    assert found == [0, 12]
    assert steps_of("3") == 3
