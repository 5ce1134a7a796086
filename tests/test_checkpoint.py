"""What is saved comes back bit for bit or is refused; the last few and the best stay; any devices may read it."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxsft.cli import Stop, UserError
from jaxsft.learn.state import TrainState
from jaxsft.run import checkpoint
from jaxsft.run.checkpoint import Checkpoints, Damaged
from jaxsft.run.log import NotFinite
from jaxsft.run.parallel import DataParallel
from jaxsft.run.working_copy import WorkingCopy
from tests import small

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def make_state(seed: int = 0, width: int = 64) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {"fc": {"kernel": rng.standard_normal((width, 10), np.float32), "bias": np.zeros(10, np.float32)}}
    stats = {"bn": {"mean": rng.standard_normal(width, np.float32), "count": np.int32(7)}}
    state = TrainState.create({"params": params, "batch_stats": stats}, OPTIMIZER, with_average=True)
    return state.replace(step=jax.numpy.int32(seed))


def save(workdir: Path, *steps: int, keep: int = 2, best: int | None = None) -> None:
    with Checkpoints(WorkingCopy(workdir), keep) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), step, {"meter": {"loss": 0.1}, "config": {}}, best)


def newest(workdir: Path, like: TrainState | None = None, set_aside: bool = False) -> checkpoint.Restored | None:
    return checkpoint.newest(workdir, lambda record: like or make_state(), set_aside=set_aside)


def assert_equal(one: TrainState, other: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with the checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2)
    return workdir


def test_comes_back_bit_for_bit_with_the_hosts_record(saved: Path) -> None:
    restored = newest(saved)
    assert restored is not None
    assert restored.step == 2
    assert_equal(restored.state, make_state(2))
    assert restored.record["meter"] == {"loss": 0.1}
    assert {"python", "jax", "optax", "orbax-checkpoint"} <= restored.record["versions"].keys()
    assert newest(saved / "elsewhere") is None


def test_the_device_may_overwrite_what_is_being_saved(tmp_path: Path) -> None:
    """The step donates the state's memory while the checkpoint is written in the background."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.device_put(make_state(1))
    with Checkpoints(WorkingCopy(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, 1, {})
        for _ in range(3):
            state = step(state)
    restored = newest(tmp_path)
    assert restored is not None
    assert_equal(restored.state, make_state(1))


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2, best=1)
    assert checkpoint.steps(tmp_path) == [1, 3, 4]
    save(tmp_path, 5, keep=2, best=4)
    assert checkpoint.steps(tmp_path) == [4, 5]


def files(workdir: Path, step: int) -> list[Path]:
    """The files of a checkpoint that hold something, by name relative to the workdir."""
    folder = workdir / "checkpoints" / str(step)
    return sorted(p.relative_to(workdir) for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def flip(content: bytes, where: float) -> bytes:
    at = int(where * (len(content) - 1))
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    **{f"bit flipped at {where:.0%}": lambda content, w=where: flip(content, w) for where in (0, 0.31, 0.5, 0.77, 1)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_or_does_not_matter(saved: Path, tmp_path: Path, capsys, damage: str) -> None:
    """Every file of a checkpoint, one at a time: the state is the one that was saved, or the one before it is used."""
    workdir, noticed = tmp_path / "run", 0
    for name in files(saved, 2):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(saved, workdir)
        change = DAMAGES[damage]
        if change is None:
            (workdir / name).unlink()
        else:
            (workdir / name).write_bytes(change((workdir / name).read_bytes()))
        restored = newest(workdir, set_aside=True)
        assert restored is not None
        assert_equal(restored.state, make_state(restored.step))
        said = capsys.readouterr().err
        if restored.step == 1:
            noticed += 1
            assert said.startswith(f"warning: the checkpoint {workdir}/checkpoints/2 is damaged (")
            assert said.endswith(f"now lies in {workdir}/damaged/2; the one before it is used\n")
            assert said.count("\n") == 1
            assert (workdir / "damaged" / "2" / name.relative_to("checkpoints/2")).exists() == (change is not None)
        else:
            assert not said
        save(workdir, 9)  # the run goes on: Orbax itself is not confused by what is left
    assert noticed >= 2  # the arrays' file and the record at least


def test_a_flipped_bit_of_an_array_is_found_by_its_checksum(saved: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(saved, tmp_path / "run")
    path = workdir / "checkpoints" / "2" / "host" / "metadata"
    record = json.loads(path.read_text())
    record["meter"]["loss"] = 0.2
    path.write_text(json.dumps(record))
    with pytest.raises(Damaged, match="its record is not what was written"):
        checkpoint.read_record(path.parent.parent)


def test_only_damaged_ones_left_is_a_new_beginning(saved: Path, tmp_path: Path, capsys) -> None:
    workdir = shutil.copytree(saved, tmp_path / "run")
    for step in (1, 2):
        (workdir / "checkpoints" / str(step) / "host" / "metadata").unlink()
    assert newest(workdir, set_aside=True) is None
    assert capsys.readouterr().err.count("is damaged (its record can't be read: ") == 2
    assert sorted(p.name for p in (workdir / "damaged").iterdir()) == ["1", "2"]


def test_another_programs_arrays_are_refused_not_set_aside(saved: Path) -> None:
    with pytest.raises(UserError, match=r"keeps other arrays than this program .* written by python 3.*, jax"):
        newest(saved, make_state(width=32), set_aside=True)
    assert checkpoint.steps(saved) == [1, 2]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    state = make_state(1)
    broken = state.replace(params={"fc": {**state.params["fc"], "bias": np.full(10, np.nan, np.float32)}})
    with Checkpoints(WorkingCopy(tmp_path), keep=2) as checkpoints:
        with pytest.raises(NotFinite, match="params/fc/bias is not finite at step 1"):
            checkpoints.save(broken, 1, {})
        assert checkpoints.latest_step() is None
    with Checkpoints(WorkingCopy(tmp_path), keep=2, on_nan="ignore") as checkpoints:
        checkpoints.save(broken, 1, {})
    assert checkpoint.steps(tmp_path) == [1]


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_others_stay(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with Checkpoints(WorkingCopy(tmp_path), keep=1) as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").touch()  # a file, where a folder must be
        with pytest.raises(Stop, match=r"a checkpoint can't be written to .*; there is no earlier one; make room"):
            checkpoints.save(make_state(2), 2, {})


@pytest.mark.full  # all; of one to eight devices by default: test_parallel's test_goes_on_on_other_devices
@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1)])
def test_resumes_on_other_devices_and_another_back_end(run, tmp_path: Path, before: int, after: int, backend: str):
    """Eight devices sum in another order than one: equal to float32 rounding that 16 steps have carried on."""
    other = {"pmap": "shard_map", "shard_map": "pmap"}[backend]
    sync = "--config.parallel.batch_norm=sync"
    arguments = (*small.ARGUMENTS, sync, "--workdir", tmp_path)
    first = run("-m", "tests.victim", "step", 8, 0, "SIGTERM", *arguments, f"--config.parallel.backend={backend}",
                devices=before)  # fmt: skip
    assert first.returncode == 143, first.stderr
    second = run("-m", "jaxsft.train", *arguments, f"--config.parallel.backend={other}", devices=after)  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert f"{after} x cpu, {other}" in second.stdout
    assert "resuming at step " in second.stdout
    assert small.outcome(tmp_path)[1][-1]["final"] is True


def test_what_a_killed_run_was_writing_is_gone_before_the_next_one_writes(tmp_path: Path) -> None:
    """Not a thread's work: it would outlive these checkpoints and take what the next to open the folder writes."""
    unfinished = tmp_path / "checkpoints" / f"2{ocp.utils.TMP_DIR_SUFFIX}" / "state"
    unfinished.mkdir(parents=True)
    before = set(threading.enumerate())
    with Checkpoints(WorkingCopy(tmp_path), keep=2):
        assert list((tmp_path / "checkpoints").iterdir()) == []
        assert not set(threading.enumerate()) - before


def test_placed_on_every_device(saved: Path) -> None:
    restored = newest(saved)
    assert restored is not None
    placed = DataParallel().replicate(restored.state)
    assert_equal(placed, make_state(2))
