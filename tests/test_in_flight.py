"""Calls that nobody waits for do not hang the CPU's devices in a collective, and what needs none has none."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxsft.run import parallel

# Time limits of XLA's own, short, so that a hang ends the process instead of the patience.
FLAGS = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=10 --xla_cpu_collective_call_terminate_timeout_seconds=20"
SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jaxsft.run import parallel

devices = parallel.DataParallel(sys.argv[1])

def train(state, data, batch):
    for _ in range(4):
        state = state - 1e-3 * lax.pmean(jnp.tanh(state @ state) * batch["x"].mean(), "batch")
    return state, {"loss": state.sum()}

def evaluate(state, data, batch):
    return {"loss": lax.psum((state * batch["x"].mean()).sum(), "batch")}

train, evaluate = devices.compile(train, donate_first=True), devices.compile(evaluate)
state, batch = devices.replicate(np.eye(4, dtype=np.float32)), devices.split({"x": np.ones(4, np.float32)})
most = 0
for call in range(int(sys.argv[2])):
    state, counts = train(state, {}, batch)
    if call % 10 == 0:  # two programs, one bound
        evaluate(state, {}, batch)
    most = max(most, len(parallel.BoundedDispatch._dispatched))
jax.block_until_ready(state)
print("most in flight:", most)
"""


@pytest.mark.parametrize(
    ("backend", "calls"),
    [("pmap", 2_000), ("shard_map", 2_000), pytest.param("pmap", 20_000, marks=pytest.mark.full)],
)
def test_thousands_of_calls_without_waiting(run, backend: str, calls: int) -> None:
    # Without the bound XLA ends the process within the first two hundred, with either back end.
    done = run("-c", SCRIPT, backend, calls, devices=2, XLA_FLAGS=FLAGS, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout == "most in flight: 2\n"


@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_compiled_ahead_is_not_compiled_by_the_call(backend: str, ahead: bool) -> None:
    """Without, the call compiles: so the test sees what it looks for."""
    devices = parallel.DataParallel(backend, jax.devices()[:1])
    step = devices.compile(lambda state, data, batch: (state + batch["x"].sum(), batch["x"].mean()), donate_first=True)
    state, batch = devices.replicate(np.float32(1)), devices.split({"x": np.ones(4, np.float32)})
    if ahead:
        step.compile_ahead(state, {}, batch)
        assert step._compilation is not None
        step._compilation.join()
    told: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **more: told.append(name))
    state, mean = step(state, {}, batch)
    compiled = [name for name in told if "backend_compile" in name]
    assert (float(state), float(mean), len(compiled)) == (5, 1, 0 if ahead else 1)


ROWS = """
import sys
import jax, numpy as np
from jaxsft.run import parallel

devices = parallel.DataParallel(sys.argv[1])
doubled = devices.compile(lambda state, data, batch: {"x": 2 * batch["x"]}, rows=True)
arguments = {}, {}, devices.split({"x": np.arange(24.0).reshape(8, 3)})
np.testing.assert_array_equal(devices.join(doubled(*arguments))["x"], 2 * np.arange(24.0).reshape(8, 3))
print("all-gather" in doubled.lower(*arguments).compile().as_text())
"""


@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
@pytest.mark.parametrize("devices", [1, 4])
def test_rows_are_joined_in_their_order_and_no_device_waits(run, backend: str, devices: int) -> None:
    done = run("-c", ROWS, backend, devices=devices)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
