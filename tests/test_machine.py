"""A CPU's cores are devices that compute one device's numbers; a command asks for huge pages once, where it may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxsft.run import machine, saved
from tests import small
from tests.conftest import ROOT, compile_flags
from tests.test_parallel import assert_same_run

OF_SO_MANY_CORES = """
import os
if hasattr(os, "sched_getaffinity"):
    os.sched_getaffinity = lambda pid: range({0})
else:
    os.cpu_count = lambda: {0}
"""
TRAIN = "import runpy\nrunpy.run_module('jaxsft.train', run_name='__main__')"
REPORTS = """
from pathlib import Path
from jaxsft.run import parallel, reporting
from tests import small  # which registers its network
reporting.of_workdir(Path({!r}))
print(parallel.all_devices(small.config()))
"""
ASKS = """
import os, pathlib, runpy, sys
from jaxsft.run import machine
machine.ENABLED = pathlib.Path({!r})
os.execv = lambda *command: sys.exit(print("imports before it asks" if "jax" in sys.modules else "asks"))
runpy.run_module("jaxsft.{}", run_name="__main__")
"""
CORES = """
from jaxsft.config import default
from jaxsft.run.parallel import all_devices
for batch_size, accumulate, last_batch, count in (
    (48, 1, "drop", 6),
    (64, 1, "drop", 4),   # 6 and 5 do not divide it
    (64, 16, "drop", 1),  # micro-batches of 4: too little for two
    (31, 1, "drop", 1),
    (64, 1, "keep", 1),   # the last batch is of any size
):
    config = default()
    config.data.batch_size, config.optim.accumulate, config.data.last_batch = batch_size, accumulate, last_batch
    parallel = all_devices(config)
    assert len(parallel.devices) == count, (batch_size, accumulate, last_batch, len(parallel.devices))
    assert parallel.statistics_axis("local") == parallel.axis_name, "cores share their statistics"
print(parallel)
"""


def python(*arguments: object, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    """A command as a user types it: nothing said of devices or of huge pages."""
    hidden = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", machine.VARIABLE)
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_as_many_cores_as_the_batch_splits_over(cache: Path) -> None:
    done = python("-c", OF_SO_MANY_CORES.format(6) + CORES, cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 x cpu core, pmap\n"


def test_who_says_how_many_devices_has_them_as_devices(cache: Path) -> None:
    """Each of its own statistics, as on accelerators."""
    program = "from jaxsft.config import default\nfrom jaxsft.run.parallel import all_devices\n"
    program += "parallel = all_devices(default())\nprint(parallel, parallel.statistics_axis('local'))"
    done = python("-c", program, cache=cache, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert (done.returncode, done.stdout) == (0, "2 x cpu, pmap None\n"), done.stderr


def test_a_run_on_cores_is_the_run_on_one_device(cache: Path, pytestconfig, tmp_path: Path) -> None:
    """With batch norm 'local': to it the cores are one device."""
    one, split = tmp_path / "one", tmp_path / "split"
    small.run_here(one, "--config.checkpoint.keep=9")
    program = OF_SO_MANY_CORES.format(2) + TRAIN
    done = python("-c", program, *small.ARGUMENTS, "--config.checkpoint.keep=9", "--workdir", split,
                  cache=cache, XLA_FLAGS=compile_flags(pytestconfig))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 x cpu core, pmap" in done.stdout
    assert_same_run(one, split)


@pytest.mark.parametrize(
    ("kernel", "said", "expected"),
    [
        ("always [madvise] never\n", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never\n", "glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never\n", "glibc.malloc.hugetlb=0", None),  # the user's will
        ("[always] madvise never\n", None, None),
        ("always madvise [never]\n", None, None),
        (None, None, None),  # no such kernel
    ],
)
def test_huge_pages_are_asked_for_once(monkeypatch, tmp_path: Path, kernel, said, expected) -> None:
    started: list[tuple] = []
    enabled = tmp_path / "enabled"
    if kernel is not None:
        enabled.write_text(kernel)
    monkeypatch.setattr(machine, "ENABLED", enabled)
    monkeypatch.setattr(os, "execv", lambda path, command: started.append((path, command)))
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(machine.VARIABLE, said)
    machine.ask_for_huge_pages()
    if expected is None:
        assert started == []
        return
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert os.environ[machine.VARIABLE] == expected
    machine.ask_for_huge_pages()
    assert len(started) == 1, "a command that has been started anew goes on"


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "predict", "explain", "serve", "report", "search", "bench.__main__"]
)
def test_commands_that_compute_ask_before_they_import(command: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "enabled").write_text("[madvise]")
    done = python("-c", ASKS.format(str(tmp_path / "enabled"), command), cache=cache)
    assert (done.returncode, done.stdout) == (0, "asks\n"), done.stderr


def test_a_run_that_is_read_back_computes_on_all_cores(tmp_path: Path, cache: Path) -> None:
    """JAX looks for devices when it is first asked for one, and does so once."""
    small.run_here(tmp_path, "--config.train.epochs=1")
    done = python("-c", OF_SO_MANY_CORES.format(2) + REPORTS.format(str(tmp_path)), cache=cache)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "2 x cpu core, pmap"), done.stderr


def test_cores_are_devices_before_a_checkpoint_is_read(tmp_path: Path, monkeypatch) -> None:
    """Reading it puts arrays on devices."""
    calls: list[str] = []
    monkeypatch.setattr(saved, "cores_are_devices", lambda: calls.append("devices"))
    monkeypatch.setattr(saved, "read", lambda *_: sys.exit(calls.append("read")))
    with pytest.raises(SystemExit):
        saved.load_run(tmp_path)
    assert calls == ["devices", "read"]


def test_compiled_programs_are_kept_where_they_can_be(tmp_path: Path, cache: Path) -> None:
    ask = "import jax; from jaxsft.run.machine import keep_compilations as keep; keep(); "
    ask += "print(jax.config.jax_compilation_cache_dir)"
    for place, said in ((tmp_path, f"{tmp_path}/jaxsft/compiled"), (Path("/proc/nowhere"), "None")):
        done = python("-W", "error", "-c", ask, cache=cache, XDG_CACHE_HOME=str(place))
        assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def test_a_place_for_compiled_programs_that_is_there_stays(tmp_path: Path) -> None:
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        machine.keep_compilations()
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_command_says_at_once_that_it_has_begun(cache: Path) -> None:
    """Before the imports that take seconds, and also where nobody reads it any more."""
    imports = "import os, sys\nfrom jaxsft.run import machine\n"
    script = imports + "{}machine.announce_start()\nprint(sorted(sys.modules), file=sys.stderr)"
    done = python("-c", script.format(""), cache=cache)
    assert done.stdout == "starting ...\n"
    assert "'jax'" not in done.stderr and "'numpy'" not in done.stderr
    done = python("-c", script.format("os.close(1)\n"), cache=cache)
    assert "Traceback" not in done.stderr
