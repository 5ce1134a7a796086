"""Whole runs whose workdir, weights, data and cache lie in a bucket, killed at any moment and on several machines."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import PIL.Image
import pytest

from jaxsft import storage
from jaxsft.run import lease
from jaxsft.run.working_copy import steps
from tests import buckets as servers
from tests import small
from tests.conftest import DEVICES, ROOT, compile_flags
from tests.test_parallel import SYNC, TRAIN, assert_same_run, ended, free_port

pytestmark = pytest.mark.full  # minutes

KILLS, MOST_STARTS = 20, 60
LONGEST = 1500  # seconds of a run
SAMPLE = (
    "--config=configs/cifar10.py:sample",
    "--config.data.source=tfds:cifar10",
    "--config.data.train_split=train[:2000]",
    "--config.data.eval_split=test[:1000]",
    "--config.train.log_every_steps=2",
    "--config.checkpoint.every_steps=3",
)
BUCKETS = ("--config.data.data_dir=gs://bucket/tfds", "--config.model.weights=gs://bucket/ported")


@pytest.fixture(scope="module")
def bucket(run, realdata: Path, tmp_path_factory):
    """gs://bucket with CIFAR-10 as TFDS prepares it, and the weights of the sample, ported."""
    ported = tmp_path_factory.mktemp("weights") / "ported"
    done = run("-m", "convert", "to-flax", "jaxsft/data/sample/resnet10_w16.safetensors", "--arch", "resnet10_w16",
               "--out", ported)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with servers.google() as server, servers.environment(server.environment):
        storage.upload(realdata / "tfds" / "cifar10", storage.location("gs://bucket/tfds/cifar10"))
        storage.upload(ported, storage.location("gs://bucket/ported"))
        server.ported = ported
        yield server


@pytest.fixture(scope="module")
def undisturbed(run, bucket, realdata: Path, tmp_path_factory):
    """What the job computes on this machine's disk."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    local = (f"--config.data.data_dir={realdata / 'tfds'}", f"--config.model.weights={bucket.ported}")
    done = run("-m", "jaxsft.train", *SAMPLE, *local, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return small.outcome(workdir)


def start(bucket, home: Path, workdir: str, flags: str) -> subprocess.Popen:
    """The job on a machine that has nothing but the bucket."""
    home.mkdir(parents=True)
    env = {**os.environ, **bucket.environment, "JAX_PLATFORMS": "cpu", "HOME": str(home), "XDG_CACHE_HOME": str(home),
           "JAXSFT_CACHE": "gs://bucket/cache", "XLA_FLAGS": flags,
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}  # fmt: skip
    command = [sys.executable, "-m", "jaxsft.train", *SAMPLE, *BUCKETS, "--workdir", workdir]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def result(workdir: str):
    with storage.local_copy(storage.location(workdir)) as copy:
        return small.outcome(copy)


def flags_of(config: pytest.Config) -> str:
    return f"{DEVICES.format(1)} {compile_flags(config)}"


def test_killed_at_twenty_random_moments_it_ends_bit_equal(bucket, undisturbed, tmp_path: Path, pytestconfig) -> None:
    """Half of the kills come while a write to the bucket is under way, half at any time after one."""
    rng, killed, during, finished = random.Random(0), 0, 0, 0
    for number in range(MOST_STARTS):
        workdir, writes, armed = f"gs://bucket/run{finished}", rng.randrange(5, 60), threading.Event()
        in_a_write = killed % 2 == 0
        left = [writes]

        def on_write(left=left, armed=armed, in_a_write=in_a_write) -> None:
            left[0] -= 1
            if left[0] == 0:
                if in_a_write:
                    process.send_signal(signal.SIGKILL)
                armed.set()

        process = start(bucket, tmp_path / str(number), workdir, flags_of(pytestconfig))
        bucket.on_write = on_write
        while process.poll() is None and not armed.wait(0.1):
            pass
        if process.poll() is None and not in_a_write:
            time.sleep(rng.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
        bucket.on_write = lambda: None
        assert "damaged" not in said
        if process.returncode == -signal.SIGKILL:
            killed, during = killed + 1, during + in_a_write
        else:
            assert process.returncode == 0, said
            assert result(workdir) == undisturbed
            finished += 1
            if killed >= KILLS:
                break
        if killed >= KILLS:  # the next is left alone
            bucket.on_write = lambda: None
            process = start(bucket, tmp_path / "last", workdir, flags_of(pytestconfig))
            said, _ = process.communicate(timeout=LONGEST)
            assert process.returncode == 0, said
            assert result(workdir) == undisturbed
            break
    print(f"{killed} kills, {during} in the middle of a write, {finished} runs finished in between")
    assert killed >= KILLS


def test_with_a_third_of_the_requests_failing_for_a_minute_it_ends_bit_equal(
    bucket, undisturbed, tmp_path: Path, pytestconfig
) -> None:
    bucket.failing = 0.3
    timer = threading.Timer(60, lambda: setattr(bucket, "failing", 0.0))
    timer.start()
    try:
        process = start(bucket, tmp_path / "home", "gs://bucket/failing", flags_of(pytestconfig))
        said, _ = process.communicate(timeout=LONGEST)
    finally:
        timer.cancel()
        bucket.failing = 0.0
    assert process.returncode == 0, said
    assert result("gs://bucket/failing") == undisturbed


def test_a_bucket_that_is_away_for_a_minute_delays_a_run(bucket, undisturbed, tmp_path: Path, pytestconfig) -> None:
    process = start(bucket, tmp_path / "home", "gs://bucket/away", flags_of(pytestconfig))
    writes = [0]

    def on_write() -> None:
        writes[0] += 1
        if writes[0] == 30:  # the first checkpoints are there
            bucket.away_until = time.monotonic() + 60

    bucket.on_write = on_write
    said, _ = process.communicate(timeout=LONGEST)
    bucket.on_write = lambda: None
    assert process.returncode == 0, said
    assert writes[0] > 30
    assert result("gs://bucket/away") == undisturbed


def test_two_runs_in_one_workdir(bucket, tmp_path: Path, pytestconfig) -> None:
    """The second is refused; the lock of the first, killed, is taken over."""
    first = start(bucket, tmp_path / "first", "gs://bucket/shared", flags_of(pytestconfig))
    deadline = time.monotonic() + 120
    while not lease.numbers(storage.location("gs://bucket/shared")) and time.monotonic() < deadline:
        time.sleep(0.2)
    second = start(bucket, tmp_path / "second", "gs://bucket/shared", flags_of(pytestconfig))
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 2, said
    assert f"error: gs://bucket/shared is in use by process {first.pid} on " in said
    first.kill()
    first.communicate()
    third = start(bucket, tmp_path / "third", "gs://bucket/shared", flags_of(pytestconfig))
    said, _ = third.communicate(timeout=LONGEST)
    assert third.returncode == 0, said


def test_the_page_about_tpu_vms_is_true(bucket, realdata: Path, cifar7: Path, tmp_path: Path, pytestconfig) -> None:
    """Each of its lines that needs neither a cloud nor the network, in its order; the run is lost once."""
    write_pictures(tmp_path / "pictures")
    here = {"BUCKET": "bucket", "IMAGENET1K_V1": str(cifar7), "PICTURES": str(tmp_path / "pictures"),
            "tuned.pth": str(tmp_path / "tuned.pth")}  # fmt: skip
    storage.upload(realdata / "tfds" / "cifar10", storage.location("gs://bucket/data/cifar10"))  # as `prepare` makes it
    small_run = ("--config.train.steps=6", "--config.optim.warmup_epochs=0", "--config.data.image_size=32",
                 "--config.data.batch_size=16", "--config.data.train_split=train[:64]",
                 "--config.data.eval_split=test[:32]", "--config.checkpoint.every_steps=2")  # fmt: skip
    lines = [line.strip() for line in (ROOT / "docs" / "tpu-vm.md").read_text().splitlines() if line.startswith("    ")]
    assert "export JAXSFT_CACHE=gs://BUCKET/cache" in lines
    commands = [line.split()[2:] for line in lines if line.startswith(("python3 -m jaxsft", "python3 -m convert"))]
    ran, said = [], ""
    for number, (module, *arguments) in enumerate(commands):
        if module == "jaxsft.data.prepare":
            continue
        for name, value in here.items():
            arguments = [argument.replace(name, value) for argument in arguments]
        command = [sys.executable, "-m", module, *arguments, *(small_run if module == "jaxsft.train" else ())]
        for attempt in range(2 if module == "jaxsft.train" else 1):
            home = tmp_path / f"{number}-{attempt}"
            env = {**os.environ, **bucket.environment, "JAX_PLATFORMS": "cpu", "HOME": str(home),
                   "XDG_CACHE_HOME": str(home), "XLA_FLAGS": flags_of(pytestconfig),
                   "JAXSFT_CACHE": "gs://bucket/vms"}  # fmt: skip
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True)  # fmt: skip
            if module == "jaxsft.train" and not attempt:
                while process.poll() is None and not steps(storage.location("gs://bucket/run")):
                    time.sleep(0.1)
                process.kill()
            said, _ = process.communicate(timeout=LONGEST)
            assert process.returncode == 0 or (module == "jaxsft.train" and not attempt), said
        ran.append(module)
        if module == "jaxsft.train":
            assert "resuming at step" in said and "damaged" not in said
    assert ran == ["convert", "jaxsft.train", "jaxsft.evaluate", "jaxsft.predict", "jaxsft.export"]
    assert (tmp_path / "tuned.pth").stat().st_size > 4e7  # float32 of 11 million parameters


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    PIL.Image.new("RGB", (40, 40)).save(folder / "a.png")


def downloads(bucket) -> list[str]:
    """What was asked for of the pictures but the last, which also fills up the last batch of an evaluation."""
    pictures = (request for request in bucket.requests if ".png" in request)
    return sorted(request for request in pictures if "val%2Fb%2F9.png" not in request)


def test_two_processes_of_four_devices(run, bucket, tmp_path: Path, pytestconfig, cache: Path) -> None:
    """Workdir and pictures in the bucket: the parameters of one process, one listing, and each picture read by one."""
    from tests.test_buckets import make_folder

    pictures = tmp_path / "pictures"
    for part in ("train", "val"):
        make_folder(pictures / part)
    storage.upload(pictures, storage.location("gs://bucket/pictures"))
    common = ("--config.data.train_split=train", "--config.data.eval_split=val", "--config.train.steps=6",
              "--config.optim.warmup_epochs=0", "--config.checkpoint.every_steps=2", "--config.data.workers=0",
              "--config.data.resident_mb=0")  # fmt: skip
    source = "--config.data.source=folder:gs://bucket/pictures"
    bucket.requests.clear()
    home = {**bucket.environment, "XDG_CACHE_HOME": str(tmp_path / "home")}
    done = run("-m", "jaxsft.train", *SYNC, *common, source, "--workdir", tmp_path / "one", **home)
    assert done.returncode == 0, done.stderr
    read = downloads(bucket)
    bucket.requests.clear()
    address = f"127.0.0.1:{free_port()}"
    flags = f"{DEVICES.format(4)} {compile_flags(pytestconfig)}"
    group = []
    for index in range(2):
        env = {**os.environ, **bucket.environment, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
               "XDG_CACHE_HOME": str(tmp_path / f"home{index}")}  # fmt: skip
        place = ("--coordinator", address, "--num-processes", "2", "--process-id", str(index))
        command = (sys.executable, "-m", *TRAIN, *SYNC, *common, source,
                   "--workdir", "gs://bucket/two", *place)  # fmt: skip
        group.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
    results = ended(group)
    assert [status for status, _, _ in results] == [0, 0], results
    assert "8 x cpu in 2 processes" in results[0][1]
    asked = [request for request in bucket.requests if "prefix=pictures" in request]
    assert sum("/o?" in request for request in asked) == 1, asked
    assert downloads(bucket) == read
    with storage.local_copy(storage.location("gs://bucket/two")) as copy:
        assert_same_run(tmp_path / "one", copy)
