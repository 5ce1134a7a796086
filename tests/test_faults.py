"""What goes wrong around a run: named in one line, with nothing lost."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jaxsft.cli import Stop, UserError
from jaxsft.models import weights
from jaxsft.run import checkpoint, saved, workdir
from jaxsft.run.best import Best
from jaxsft.run.events import EventsWriter
from jaxsft.run.log import records
from tests import small
from tests.small import run_here


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run_here(path)
    return path


def unfinish(path: Path) -> None:
    """Take the last line off the log: the run is to resume at its newest checkpoint."""
    log = path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))


def test_a_damaged_newest_checkpoint_costs_only_time(finished: Path, tmp_path: Path, capsys) -> None:
    path = shutil.copytree(finished, tmp_path / "run")
    unfinish(path)
    for file in (path / "checkpoints" / "16" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run_here(path)
    said = capsys.readouterr()
    assert re.search(
        r"checkpoints/16 is damaged \(.+\) and now lies in \S+/damaged/16; the one before it is used", said.err
    )
    assert "resuming at step 15 of 16" in said.out
    assert small.outcome(path) == small.outcome(finished)
    assert (path / "damaged" / "16").is_dir()


def test_a_cut_off_log_is_mended(finished: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished, tmp_path / "run")
    log = path / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    run_here(path)
    assert small.outcome(path) == small.outcome(finished)


@pytest.mark.parametrize("name", ["model.json", "config.json"])
def test_a_cut_record_is_read_from_the_newest_checkpoint(finished: Path, tmp_path: Path, name: str) -> None:
    """What a power cut may leave of a small file: whoever reads the run, and who resumes it, misses nothing."""
    path = shutil.copytree(finished, tmp_path / "run")
    whole = (path / name).read_text()
    (path / name).write_text(whole[:40])
    found = saved.read(path)
    assert found.card == saved.read(finished).card
    assert found.config == saved.read(finished).config
    unfinish(path)
    shutil.rmtree(path / "checkpoints" / "16")
    run_here(path)
    assert (path / name).read_text() == whole
    assert small.outcome(path) == small.outcome(finished)


def test_a_resumed_run_on_files_is_the_same(tmp_path: Path) -> None:
    """Streamed by a worker, with random crops and mixing: resumed in the middle of an epoch, bit for bit."""
    rng = np.random.default_rng(0)
    for i in range(48):
        file = tmp_path / "images" / ("train" if i < 40 else "val") / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), np.uint8)).save(file)
    files = (
        f"--config.data.source=folder:{tmp_path / 'images'}",
        "--config.data.train_split=train",
        "--config.data.eval_split=val",
        "--config.data.batch_size=8",
        "--config.data.workers=1",
        "--config.data.augment=('random_resized_crop', 'flip')",
        "--config.train.cutmix=1.0",
        "--config.train.mixup=0.2",
        "--config.train.steps=11",
    )
    run_here(tmp_path / "whole", *files)
    resumed = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    unfinish(resumed)
    shutil.rmtree(resumed / "checkpoints" / "11")
    run_here(resumed, *files)
    assert small.outcome(resumed) == small.outcome(tmp_path / "whole")


FULL_DISK = """
mount -t tmpfs -o size=360k none "$0" || exit 77
"$@"; status=$?
ls "$0/run/checkpoints"
exit $status
"""


def test_a_full_disk(run, cache: Path, finished: Path, tmp_path: Path) -> None:
    """A file system of 360 KB, in which two checkpoints of 136 KB find room, not three."""
    command = [sys.executable, "-m", "jaxsft.train", *small.ARGUMENTS, "--workdir", tmp_path / "run"]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    command = ["unshare", "-rm", "bash", "-c", FULL_DISK, tmp_path, *command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this system lets no user mount a small file system: {done.stderr}")
    assert done.returncode == 1, done.stderr
    assert done.stderr == (
        f"error: a checkpoint can't be written to {tmp_path}/run/checkpoints: No space left on device;"
        " intact: step 3, 4; make room or mend the disk; the same command then resumes\n"
    )
    assert {"3", "4"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: [tensorstore_spec='{}'] [os_error_code='28']"), "No space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: \"0\": No: space [os_error_code='28'] [a='b']"), "No space left on device"),
        (ValueError("Error writing file [OS error 30: EROFS Read-only file system]"), "Read-only file system"),
        (ValueError("\n  torn\nmore"), "torn"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_reason_of_a_failed_write_is_the_systems(raised: Exception, told: str) -> None:
    """TensorStore names the system's error in an order that changes from process to process."""
    assert checkpoint.first_line(raised) == told


def test_a_full_disk_under_the_log(tmp_path: Path, monkeypatch) -> None:
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    with pytest.raises(Stop, match=r"run/events can't be written: No space left on device; make room") as stop:
        run_here(tmp_path / "run")
    assert stop.value.status == 1


def unwritable(tmp_path: Path) -> dict[str, Path]:
    """Places where nothing can be written, also by root."""
    (tmp_path / "file").touch()
    return {"under a file": tmp_path / "file" / "run", "a file": tmp_path / "file", "in /proc": Path("/proc/run")}


@pytest.mark.parametrize("where", ["under a file", "a file", "in /proc"])
def test_an_unwritable_workdir_is_noticed_before_any_work(tmp_path: Path, where: str) -> None:
    path = unwritable(tmp_path)[where]
    with pytest.raises(UserError, match=f"{path} can't be written: .*; give another --workdir"):
        workdir.check(path, small.config())


def test_a_path_that_is_no_utf8_is_noticed_before_any_work(tmp_path: Path) -> None:
    """TensorStore has no name for it; a letter beyond ASCII is no matter."""
    odd = tmp_path / os.fsdecode(b"\xff") / "run"
    with pytest.raises(UserError, match="can't be used: its path is no UTF-8; name another directory"):
        workdir.check(odd, small.config())
    with pytest.raises(UserError, match="can't be used: its path is no UTF-8; name another directory"):
        weights.save(odd, {}, weights.ModelCard("resnet18", 10))
    assert not any(tmp_path.iterdir())
    workdir.check(tmp_path / "Läufe", small.config())


def test_what_has_come_to_a_path_that_is_no_utf8_is_not_called_damaged(finished: Path, tmp_path: Path, run) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    moved = shutil.copytree(finished, odd / "run")
    with pytest.raises(UserError, match="can't be used: its path is no UTF-8"):
        saved.read(moved)
    command = ("-m", "jaxsft.evaluate", "--config", "tests/small.py", "--workdir", finished)
    done = run(*command, XDG_CACHE_HOME=str(odd))  # it does without a cache
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, backend: str) -> None:
    """At a rate of 1e30 the first update makes a variance overflow, and the second loss, or the third, is no number."""
    overrides = ("--config.optim.lr=1e30", "--config.optim.warmup_epochs=0", f"--config.parallel.backend={backend}")
    with pytest.raises(Stop) as stop:
        run_here(tmp_path, *overrides)
    assert re.fullmatch(
        r"the loss is (nan|inf) at step [23]; there is no good checkpoint yet; try a smaller --config.optim.lr,"
        r" --config.optim.warmup_epochs=1 or --config.optim.clip_norm=1 in another --workdir",
        str(stop.value),
    )
    assert stop.value.status == 1


def test_a_late_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    overrides = ("--config.optim.schedule=step", "--config.optim.step_epochs=2", "--config.optim.step_factor=1e35")
    place = rf"the last good checkpoint is {tmp_path}/checkpoints"
    with pytest.raises(Stop, match=rf"at step (10; {place}/8|11; {place}/9); try"):
        run_here(tmp_path, *overrides)
    assert all(record["step"] <= 11 for record in records(tmp_path))


def test_a_loss_that_is_not_finite_is_ignored_where_asked(tmp_path: Path) -> None:
    run_here(tmp_path, "--config.optim.lr=1e30", "--config.train.on_nan=ignore")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])  # strict JSON: null, not NaN
    assert last["final"] is True
    assert last["loss"] is None


HOLD = """
import sys, time
from pathlib import Path
from jaxsft.run.workdir import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_workdir_is_refused_and_a_crash_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"{tmp_path} is in use by process {holder.pid} on \S+; wait for it, or"):
            workdir.check(tmp_path, small.config())
    finally:
        holder.kill()
        holder.wait()
    workdir.check(tmp_path, small.config())
    with workdir.lock(tmp_path):
        pass


def test_a_clock_that_jumps_does_nothing(finished: Path, tmp_path: Path, monkeypatch) -> None:
    """Each look at the clock is a year before or after the last one."""
    real, jumps = time.time, itertools.cycle((-3e7, 3e7, 0, 6e7))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    run_here(tmp_path / "run")
    assert small.outcome(tmp_path / "run") == small.outcome(finished)


def test_a_run_may_go_on_with_another_back_end_but_no_other_rate(finished: Path, capsys) -> None:
    run_here(finished, "--config.parallel.backend=shard_map", "--config.checkpoint.keep=5")
    assert "finished at step 16" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"of another config: optim.lr \(0.05 there, 0.1 here\); give another --workdir"
    ):
        run_here(finished, "--config.optim.lr=0.1")


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    overrides = ("--config.checkpoint.best_metric=loss", "--config.checkpoint.keep=1", "--config.optim.lr=3")
    run_here(tmp_path, *overrides)
    evaluations = {r["step"]: r["loss"] for r in records(tmp_path) if r["split"] == "eval"}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert Best.of(tmp_path, "loss").step == best
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == sorted({best, small.STEPS})
