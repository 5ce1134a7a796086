"""`bench tpu` compiles for a TPU that is not there, whoever else uses libtpu at the time."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from jax.experimental import topologies

from jaxsft.bench import tpu
from tests.conftest import ROOT

SMALL = ("--arch=resnet10_w16", "--image-size=32", "--batch-size=16", "--topology=v5e:2x2")


def test_libtpu_is_told_that_it_is_not_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is loaded, and a user who says otherwise is heard."""
    asked = lambda **_: SimpleNamespace(devices=[os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"]])
    monkeypatch.setattr(topologies, "get_topology_desc", asked)
    for environment, value in (({}, "1"), ({"ALLOW_MULTIPLE_LIBTPU_LOAD": "0"}, "0")):
        monkeypatch.setattr(os, "environ", environment)
        assert tpu.topology("v5e:2x2") == [value]


@pytest.mark.full
def test_two_compile_at_a_time() -> None:
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "jaxsft.bench", "tpu", *SMALL]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in both:
        said, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        assert "bfloat16, float32 products in 1 bfloat16 pass (default)" in said
