"""`bench.apart`: contestants in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxsft.bench import apart
from jaxsft.cli import UserError
from tests.conftest import ROOT


def adds(number: int) -> Callable[[int], tuple[int, int]]:
    """A contestant: its process, and a sum."""
    if number < 0:
        raise UserError("it is negative", "make it positive")
    return lambda other: (os.getpid(), number + other)


def test_each_has_a_process_of_its_own_and_keeps_it() -> None:
    with apart.contestants({"one": (adds, 1), "two": (adds, 2), "bad": (adds, -1)}) as found:
        one, two = found["one"](10), found["two"](10)
        seconds = apart.medians({"one": (found["one"], (5,)), 2: (found["two"], (5,))}, rounds=2, seconds=1e-4)
        assert found["one"](1) == (one[0], 2)
        with pytest.raises(UserError, match=r"^it is negative; make it positive$") as error:
            found["bad"](1)
        assert error.value.status == 2
    assert (one[1], two[1]) == (11, 12)
    assert len({os.getpid(), one[0], two[0]}) == 3
    assert set(seconds) == {"one", 2} and all(spent > 0 for spent in seconds.values())


def test_none_is_left_where_the_command_is_killed() -> None:
    program = "from jaxsft.bench import apart\nfrom tests.test_bench_apart import adds\n"
    program += (
        "print(apart.Contestant(adds, 1)(1)[0], flush=True)\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program]  # one that is left holds its stdout open
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until = time.monotonic() + 30
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_a_turn_is_as_many_calls_as_take_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a turn the first call is not timed; of the rounds the median counts."""
    heard: list[int] = []
    spent = iter([9.0, 0.5, 9.0, 4.0, 9.0, 8.0, 9.0, 6.0])  # first, one, then in each of three rounds: not timed, timed

    class Fake(apart.Contestant):
        def __init__(self) -> None:
            pass

        def timed(self, count: int, *arguments: object) -> tuple[float, object]:
            heard.append(count)
            return next(spent), None

    assert apart.medians({"it": (Fake(), ())}, rounds=3, seconds=1.0) == {"it": 3.0}
    assert heard == [1, 1, 1, 2, 1, 2, 1, 2]
