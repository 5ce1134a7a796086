"""What a run writes and how it reaches its bucket: the working copy, cut off anywhere, and the lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from pathlib import Path

import gcsfs.core
import pytest

from jaxsft import cli, patience, storage
from jaxsft.run import checkpoint, lease, pretrained, saved, training, working_copy
from jaxsft.run.checkpoint import Checkpoints
from jaxsft.run.lease import Lease
from jaxsft.run.log import records
from jaxsft.run.working_copy import COMMITTED, WorkingCopy
from tests import small
from tests.commands import run_command
from tests.test_checkpoint import make_state


def fill(path: Path, step: int, keep: int) -> None:
    """What a run writes until the checkpoint of `step`, of which it keeps the last ones."""
    folder = path / "checkpoints" / str(step)
    (folder / "state").mkdir(parents=True)
    for name in ("state/a", "state/b", "host", COMMITTED, f"state/{COMMITTED}"):  # the last two as Orbax does on a disk
        (folder / name).write_text(f"{name} of {step}")
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "split": "train"}) + "\n")
    for old in checkpoint.steps(path)[:-keep]:
        shutil.rmtree(path / "checkpoints" / str(old))


def test_cut_off_between_any_two_writes_a_run_can_be_resumed(google, place) -> None:
    steps = list(range(1, 4))
    for writes in range(100):
        workdir = place / str(writes)
        google.writes_left = writes
        try:
            copy = WorkingCopy(workdir)
            for step in steps:
                fill(copy.path, step, keep=1)
                copy.flush()
            done = True
        except cli.Stop:
            done = False
        google.writes_left = None
        found = checkpoint.steps(workdir)
        assert [step for step in found if (workdir / "checkpoints" / str(step) / "host").is_file()] == found
        again = WorkingCopy(workdir)
        assert checkpoint.steps(again.path) == found
        last = found[-1] if found else 0
        logged = [record["step"] for record in records(again.path)]
        assert logged[:last] == steps[:last]  # what may be ahead is cut when the run resumes
        for step in found:
            texts = [(again.path / "checkpoints" / str(step) / name).read_text() for name in ("state/a", "host")]
            assert texts == [f"state/a of {step}", f"host of {step}"]
        left = {int(name.split("/")[1]) for name in workdir.walk() if name.startswith("checkpoints/")}
        assert left == set(found)  # what a send that was cut off had left is gone
        if done:
            assert found == [3] and writes > 10
            return


def test_a_file_that_grows_while_it_is_sent_arrives_as_it_was(google, place, monkeypatch) -> None:
    copy = WorkingCopy(place)
    (copy.path / "metrics.jsonl").write_bytes(b"x" * 6_000_000)  # more than goes in one request
    begin = gcsfs.core.initiate_upload

    async def grow(*args: object, **kwargs: object) -> object:
        with (copy.path / "metrics.jsonl").open("ab") as file:
            file.write(b"y" * 1000)
        return await begin(*args, **kwargs)

    monkeypatch.setattr(gcsfs.core, "initiate_upload", grow)
    monkeypatch.setattr(patience, "PATIENCE", 1.0)
    copy.flush()
    assert (place / "metrics.jsonl").read_bytes() == b"x" * 6_000_000
    copy.flush()
    assert (place / "metrics.jsonl").stat().size == 6_001_000


def test_a_run_in_a_bucket_is_the_same_and_resumes_from_there_alone(google, place, tmp_path: Path) -> None:
    config = small.config("--config.train.epochs=2")
    training.train(config, tmp_path / "run")
    expected = small.outcome(tmp_path / "run")

    class Cut(BaseException):
        """The power is cut."""

    def cut(self: training.Trainer, step: int) -> None:
        original(self, step)
        if step >= 4:
            self.checkpoints.wait()
            raise Cut

    original = training.Trainer.save
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Cut):
        patch.setattr(training.Trainer, "save", cut)
        patch.setattr(WorkingCopy, "__exit__", lambda *_: None)
        training.train(config, place)
    assert [path.name for path in place.iterdir() if path.name.startswith("lock")] == []
    assert checkpoint.steps(place)[-1] < 8
    training.train(config, place)
    with storage.local_copy(place) as copy:
        assert small.outcome(copy) == expected
        assert any((copy / "events").iterdir()) and (copy / "report.html").exists()
    status, said = run_command(f"evaluate --workdir {place} --json {place}/result.json", tmp_path)
    assert status == 0, said
    assert json.loads((place / "result.json").read_text())["step"] == 8
    (place / "report.html").unlink()
    status, said = run_command(f"report --workdir {place}", tmp_path)
    assert status == 0 and "Worst mistakes" in (place / "report.html").read_text(), said
    status, said = run_command(f"export --workdir {place} --format safetensors --out {place}/a.safetensors", tmp_path)
    assert status == 0, said
    assert (place / "a.safetensors").is_file() and COMMITTED in {p.rpartition("/")[2] for p in place.walk()}
    assert saved.load_run(place).step == 8
    variables, card = pretrained.load_pretrained(str(place), small.ARCH)  # another run begins from there
    assert card.source == f"{place.name} at step 8" and "fc" in variables["params"]
    leftovers = list(Path(working_copy.tempfile.gettempdir()).glob(f"{working_copy.SCRATCH}*"))
    assert all((left / working_copy.IN_USE).exists() for left in leftovers)


def test_a_copy_stays_for_as_long_as_it_is_held(google, place, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(working_copy.tempfile, "tempdir", str(tmp_path))
    held: list[bool] = []

    def flush(self: WorkingCopy) -> None:  # the last, when the run is over
        WorkingCopy(place)
        held.append(self.path.exists())

    with monkeypatch.context() as patch:
        patch.setattr(WorkingCopy, "flush", flush)
        with WorkingCopy(place) as copy:
            pass
    assert held[0] and not copy.path.exists()
    killed = WorkingCopy(place)
    killed._in_use.close()
    WorkingCopy(place)
    assert not killed.path.exists()


def test_no_room_for_a_copy_is_one_line(google, place, monkeypatch) -> None:
    def full(**options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(working_copy.tempfile, "mkdtemp", full)
    with pytest.raises(cli.UserError, match="can't be copied to this machine: No space left on device; make room"):
        WorkingCopy(place)


def test_a_damaged_checkpoint_is_set_aside_in_the_bucket_too(google, place, capsys) -> None:
    with WorkingCopy(place) as copy, Checkpoints(copy, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), step, {})
    (place / "checkpoints" / "2" / "host" / "metadata").write_bytes(b"{}")
    with WorkingCopy(place) as copy:
        found = checkpoint.newest(copy.path, lambda _: make_state(0), set_aside=True, place=place)
    assert found is not None and found.step == 1
    said = capsys.readouterr().err
    assert f"warning: the checkpoint {place}/checkpoints/2 is damaged (its record can't be read" in said
    assert f" and now lies in {place}/damaged/2; the one before it is used" in said
    assert checkpoint.steps(place) == [1]
    assert (place / "damaged" / "2" / "host" / "metadata").read_bytes() == b"{}"


def owner(**values: object) -> bytes:
    return json.dumps({**lease.this_process(), **values}).encode()


def test_a_second_run_is_refused_and_the_lock_of_a_dead_one_taken(google, place, monkeypatch) -> None:
    with Lease(place) as held:
        with pytest.raises(cli.UserError, match="is in use by process"):
            Lease(place)
        held.check()
    assert not place.exists()
    (place / "lock.7").write_bytes(owner(started="long ago"))  # a process of this machine that has ended
    with Lease(place):
        assert [path.name for path in place.iterdir()] == ["lock.8"]


def test_the_lock_of_another_machine_is_taken_when_nothing_is_heard_of_it(google, place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(lease, "DEAD", 1.5)
    monkeypatch.setattr(lease, "BEAT", 0.1)
    (place / "lock.1").write_bytes(owner(host="elsewhere"))
    began = time.monotonic()
    with Lease(place) as held:
        assert 0.5 < time.monotonic() - began < 15
        assert "was held by process" in capsys.readouterr().err
        # One that was only asleep: another run has meanwhile taken the lock.
        (place / "lock.3").write_bytes(owner(host="elsewhere"))
        deadline = time.monotonic() + 10
        while not held.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(cli.Stop, match="was taken over by another run"):
            held.check()


def test_the_lock_of_another_machine_that_lives_is_respected(google, place, monkeypatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "DEAD", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "this_process", lambda: {**original(), "host": "elsewhere"})
        held = Lease(place)
    with held, pytest.raises(cli.UserError, match="in use by process .* on elsewhere"):
        Lease(place)


original = lease.this_process
