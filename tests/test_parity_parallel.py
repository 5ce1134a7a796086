"""The step on several devices: "sync" batch norm equals the whole batch on one, "local" equals torch's DDP, and what
dropout and stochastic depth drop is the same; a head alone, on features that all have made, is trained as on one.

All in float64, so that only the order of summation differs: 1e-10 relative after two steps.
"""

from __future__ import annotations

import json

import pytest

ROUNDING = 1e-10


def cases(run, backends: str, counts: str) -> dict[str, float]:
    done = run("-m", "tests.parallel_case", backends, counts, devices=8)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(result: dict[str, float]) -> None:
    for case, relative in result.items():
        if "rank 0" in case:
            # DDP would keep rank 0's running statistics and lose the other replicas'; ours are the mean of all, so that
            # no example is left out and the result does not depend on the order of the devices.
            assert relative > 1e-4, case
        else:
            assert relative <= ROUNDING, f"{case}: {relative}"


def test_some_devices(run) -> None:
    result = cases(run, "pmap", "4")
    assert len(result) == 1 + 1 + 1 + 3
    check(result)


@pytest.mark.full
def test_all_numbers_of_devices(run) -> None:
    result = cases(run, "pmap,shard_map", "1,2,4,8")
    assert len(result) == 2 * (4 + 4 + 4 + 3)
    check(result)
