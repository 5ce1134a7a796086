"""The loader's worker processes: killed, left alone, or without room, the batches are the same or the cause is told."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxsft import recipes
from jaxsft.cli import Stop
from jaxsft.data import handover, loader, pipeline
from jaxsft.data.order import Order
from jaxsft.data.reading import EvalPlan, TrainPlan
from jaxsft.models.weights import Preprocessing
from jaxsft.run.parallel import DataParallel
from tests.conftest import ROOT
from tests.failing import Deadly, Raising
from tests.pictures import Pictures

LABELS = np.arange(10, dtype=np.int32) % 2
PICTURES = Pictures(LABELS)
PLAN = TrainPlan(Order(10, 4, seed=0))
DEVICES = DataParallel()


@pytest.fixture
def open_loader():
    """Loaders that are closed in the end: open_loader(source, plan, workers)."""
    opened = []

    def open_(source=PICTURES, plan=PLAN, workers: int = 2):
        opened.append(loader.make_loader(source, plan, DEVICES, Preprocessing(48, 40), workers=workers))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]))


@pytest.mark.parametrize("plan", [PLAN, pytest.param(EvalPlan(10, 4), marks=pytest.mark.full)], ids=["train", "eval"])
def test_where_a_worker_is_killed_the_batches_are_the_same(open_loader, plan, capsys) -> None:
    alone, together = open_loader(workers=0, plan=plan), open_loader(plan=plan)
    steps = [0, 1, 2] * 4 if isinstance(plan, EvalPlan) else range(12)
    for number, step in enumerate(steps):
        assert_same(together.batch(step), alone.batch(step))
        if number == 1:
            victim = multiprocessing.active_children()[0]
            victim.kill()
            victim.join(10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: a worker process of the loader was killed by SIGKILL, most likely for want of mem")


def test_workers_that_are_killed_again_and_again_end_the_run(open_loader, capsys) -> None:
    stream = open_loader(Deadly(LABELS, at=int(PLAN.order[0][0])), workers=1)
    with pytest.raises(
        Stop,
        match=r"^a worker process of the loader was killed by SIGKILL, most likely for want of memory, 3 times at batch"
        r" 0; give fewer --config.data.workers \(now 1\) or a smaller --config.data.batch_size; the same command then",
    ) as stop:
        stream.batch(0)
    assert stop.value.status == 1
    assert len(capsys.readouterr().err.splitlines()) == loader.DEATHS - 1
    assert not multiprocessing.active_children()


def test_deaths_with_batches_between_are_no_reason_to_stop(open_loader) -> None:
    alone, together = open_loader(workers=0), open_loader(workers=0)
    for step in range(loader.DEATHS + 2):
        assert_same(together.batch(step), alone.batch(step))
        together._pipeline = Killed()


class Killed:
    """A pipeline whose worker is killed."""

    def __next__(self):
        raise pipeline.WorkerDied(signal.SIGKILL)

    def close(self) -> None: ...


def test_a_source_that_cant_be_sent_to_workers_is_read_here(open_loader, capsys) -> None:
    class Locked(Pictures):
        """It can't be pickled."""

        def __init__(self) -> None:
            super().__init__(LABELS)
            object.__setattr__(self, "lock", threading.Lock())

    assert_same(open_loader(Locked(), workers=1).batch(0), open_loader(workers=0).batch(0))
    assert not multiprocessing.active_children()
    assert capsys.readouterr().err == (
        "warning: a Locked can't be pickled (cannot pickle '_thread.lock' object), so that no worker process can read"
        " it; this one does, more slowly\n"
    )


OF_A_CONFIG = """
from tests.pictures import Pictures
from tests import small

class Own(Pictures):
    def __getitem__(self, index):
        return super().__getitem__(index).rotate({angle})

def get_config():
    return small.get_config()
"""


def test_workers_read_the_sources_of_config_files(open_loader, tmp_path: Path) -> None:
    """Of several, each its own: none takes another's place."""
    for angle in (90, 180):
        (tmp_path / f"by{angle}.py").write_text(OF_A_CONFIG.replace("{angle}", str(angle)))
        recipes.load(f"{tmp_path}/by{angle}.py")
    modules = [module for name, module in sys.modules.items() if name.startswith("config_")]
    classes = [module.Own for module in modules if str(module.__file__).startswith(str(tmp_path))]
    assert len({own.__module__ for own in classes}) == 2
    for own in classes:
        assert_same(open_loader(own(LABELS), workers=1).batch(0), open_loader(own(LABELS), workers=0).batch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_of_ours_keeps_its_traceback(open_loader, workers: int) -> None:
    with pytest.raises(RuntimeError, match="^a bug") as raised:
        open_loader(Raising(LABELS, at=int(PLAN.order[0][0])), workers=workers).batch(0)
    assert "failing.py" in "".join(str(entry.path) for entry in raised.traceback)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(5, "Input/output error", "/data/a.rec"), "[Errno 5] Input/output error: '/data/a.rec'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_the_system_refuses_is_told_as_it_is(open_loader, error: Exception, told: str) -> None:
    """Never as an OSError, which the loop would take for one of its own directory."""
    with pytest.raises(Stop) as stop:
        open_loader(Raising(LABELS, at=int(PLAN.order[0][0]), error=error), workers=0).batch(0)
    assert str(stop.value).startswith(f"the loader can't make batch 0: {told}; mend that, or give fewer")


def test_the_signals_of_a_terminal_reach_no_worker(open_loader) -> None:
    stream = open_loader(workers=1)
    stream.batch(0)
    before = {child.pid for child in multiprocessing.active_children()}
    for pid in before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    for step in range(1, 12):
        stream.batch(step)
    assert {child.pid for child in multiprocessing.active_children()} == before


# A program that reads batches for a minute, its workers' numbers on stdout.
READING = """
import multiprocessing, time
from tests.test_workers import *
stream = loader.make_loader(PICTURES, PLAN, DEVICES, Preprocessing(48, 40), workers=1)
stream.batch(0)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="only where /dev/shm shows what is left")
def test_a_killed_program_leaves_neither_workers_nor_shared_memory() -> None:
    program = subprocess.Popen([sys.executable, "-c", READING], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 1 and all(map(alive, workers))
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in (program.pid, *workers))
    made = {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" in maps}  # others make some, too
    assert made
    program.kill()
    program.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) or made & set(os.listdir("/dev/shm")):
        assert time.monotonic() < deadline, (workers, made)
        time.sleep(0.05)


# Batches of 9.6 MB, in a mount namespace where /dev/shm is as the mount's options say.
SMALL_SHM = """
mount -t tmpfs -o "$0" none /dev/shm || exit 77
exec "$@"
"""
LARGE = """
from tests.test_workers import *
pictures, plan, to = Pictures(LABELS.repeat(7)), TrainPlan(Order(70, 64, seed=0)), Preprocessing(256, 224)
streams = [loader.make_loader(pictures, plan, DEVICES, to, workers=workers) for workers in (1, 0)]
for step in range(4):
    assert_same(*(stream.batch(step) for stream in streams))
print("the same")
"""


@pytest.mark.parametrize("options", ["size=1m", "ro", pytest.param("size=4k", marks=pytest.mark.full)])
def test_shared_memory_may_be_small_or_missing(options: str) -> None:
    command = ["unshare", "-rm", "bash", "-c", SMALL_SHM, options, sys.executable, "-c", LARGE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this system lets no user mount a small file system: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same\n"
    assert ("threads decode" in done.stderr) == (options != "size=1m"), done.stderr


def test_threads_do_what_processes_would(open_loader, monkeypatch, capsys) -> None:
    monkeypatch.setattr(handover, "possible", lambda: False)
    alone, together = open_loader(workers=0), open_loader()
    for step in range(5):
        assert_same(together.batch(step), alone.batch(step))
    assert not multiprocessing.active_children()
    assert capsys.readouterr().err.startswith(
        "warning: worker processes can't be used (memfd is not allowed); threads decode instead"
    )


def test_what_is_handed_over_is_whole_and_its_memory_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "POOL", handover.Pool())
    packer, open_before = handover.Packer(), len(os.listdir("/proc/self/fd"))
    value = {"image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3), "none": np.zeros((0, 3)), "bad": [(1, "x")]}
    for round_ in range(5):
        parcels = [packer(value) for _ in range(3)]  # several may wait
        assert len(handover.POOL.pieces) <= 3 + (round_ > 0) * handover.MOST_BACK
        for parcel in parcels:
            found = handover.unpack(parcel)
            assert found["bad"] == value["bad"]
            for name in ("image", "none"):
                np.testing.assert_array_equal(found[name], value[name])
                assert found[name].dtype == value[name].dtype
    with pytest.raises(handover.Gone):
        handover.unpack(parcels[0]._replace(pieces=((parcels[0].pieces[0][0], 0),)))  # another file has its number
    with pytest.raises(handover.Gone):
        handover.unpack(parcels[0]._replace(process=2**22 + 1))
    del found
    handover.POOL = None  # type: ignore[assignment]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= open_before


def test_pixels_are_written_where_they_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy; what is still in use is left alone, and what is back is written to again."""
    monkeypatch.setattr(handover, "POOL", handover.Pool())
    packer, held = handover.Packer(), []
    for step in range(handover.MOST_LENT + 8):
        image = handover.empty((5, 7, 3))
        image[:] = step
        parcel = packer({"image": image, "label": np.arange(5) + step})
        assert len(parcel.pieces) == 2
        found = handover.unpack(parcel)
        image[0, 0, 0] = 255  # the same memory
        assert found["image"][0, 0, 0] == 255
        assert found["image"].ctypes.data % handover.ALIGNED == 0
        held.append(found)
    for step, found in enumerate(held):
        assert (found["image"][1:] == step).all() and (found["label"] == np.arange(5) + step).all()
    assert len(handover.POOL.pieces) <= handover.MOST_LENT + 3  # who keeps more has them without us
    before = {piece.descriptor for piece in handover.POOL.pieces}
    del found, held, image
    gc.collect()
    for _ in range(9):
        image = handover.empty((5, 7, 3))
        handover.unpack(packer({"image": image, "label": np.arange(5)}))
        assert {piece.descriptor for piece in handover.POOL.pieces} <= before
        assert len(handover.POOL.pieces) <= handover.MOST_BACK + 2  # those just sent
        handover.empty((6, 7, 3))  # filled for nothing
        assert len({*map(len, (piece.memory for piece in handover.POOL.pieces))}) <= 3


@pytest.mark.full
def test_what_another_system_hands_over_is_copied(open_loader, monkeypatch) -> None:
    """Grain's own shared memory is gone with the workers, and what is on a CPU would point into it."""
    monkeypatch.setattr(handover, "possible", lambda: False)
    monkeypatch.setattr(pipeline.sys, "platform", "darwin")
    alone, together = open_loader(workers=0), open_loader()
    for step in range(3):
        assert_same(together.batch(step), alone.batch(step))
    batch = next(together._pipeline)
    assert batch["image"].flags.owndata
