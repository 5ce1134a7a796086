"""The main job as a user runs it: `python -m jaxsft.train`, on the embedded sample and on the real CIFAR-10."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from convert.__main__ import to_flax
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.data.embedded import WEIGHTS as SAMPLE
from jaxsft.models.initial import decide_head, initial
from jaxsft.models.weights import ModelCard, save
from jaxsft.run.pretrained import load_pretrained
from jaxsft.run.saved import load_run
from tests import small
from tests.commands import hear_command, run_command

CONFIG = "configs/cifar10.py"
# What a run must never import, said by the run itself as it ends.
WATCHED = """
import runpy, sys
sys.argv = ["train", *sys.argv[1:]]
try:
    runpy.run_module("jaxsft.train", run_name="__main__")
except SystemExit as end:
    found = sorted({"torch", "tensorflow"} & set(sys.modules))
    print("imported:", ", ".join(found) or "neither")
    sys.exit(end.code)
"""


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory: pytest.TempPathFactory):
    """A run of the sample, two epochs long: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("runs") / "sample"
    command = ("-m", "jaxsft.train", "--config", f"{CONFIG}:sample", "--workdir", workdir, "--config.train.epochs=2")
    done = run(*command, "--profile=2", optimised=True)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_leaves_a_whole_workdir_and_says_where(finished) -> None:
    workdir, said = finished
    names = {path.name.split(".")[0] for path in workdir.iterdir()}
    assert {"config", "model", "metrics", "checkpoints", "events"} <= names
    assert "its head of 7 classes replaced by one of 10" in said
    assert said.splitlines()[-1].startswith(f"{workdir}: accuracy 0.")
    assert f"traced 2 steps: xprof --logdir {workdir}/profile --port 8791 (pip install xprof)" in said
    assert "; float32 (auto), products in full\n" in said
    report = (workdir / "report.html").read_text()
    assert '<th scope="row">computed in</th><td>float32 (auto), products in full</td>' in report
    assert "<summary>All 38 arrays</summary>" in report and "310,746 of 310,746 numbers train" in report
    assert '<th scope="row">fc/kernel</th><td>128x10</td><td>0</td><td>0.02</td><td>0.0005</td>' in report
    assert "1 x cpu, pmap" in report and len(report) < 2_000_000
    lines = records(workdir)
    assert lines[-1]["final"] is True
    assert lines[-1]["count"] == 1000
    assert lines[-1]["accuracy"] >= 0.6
    assert [line["step"] for line in lines if line["split"] == "train"] == [20, 40]
    for line in lines:
        assert {"step", "epoch", "split", "loss", "accuracy", "time"} <= line.keys()
    assert {"lr", "images_per_sec"} <= lines[0].keys()


def test_the_same_command_again_says_it_is_finished(finished, tmp_path: Path) -> None:
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    command = f"train --config {CONFIG}:sample --workdir {workdir} --config.train.epochs=2"
    status, printed, said = hear_command(command, tmp_path)
    assert (status, "finished at step 40" in printed) == (0, True), said
    assert (workdir / "metrics.jsonl").read_bytes() == before
    status, said = run_command(f"{command} --config.optim.lr=0.5", tmp_path)
    assert status == 2
    assert "optim.lr (0.02 there, 0.5 here)" in said


@pytest.mark.full
def test_pretrained_beats_scratch(finished, run, tmp_path: Path) -> None:
    # Measured over 20 epochs: 0.75 against 0.48. After two epochs of 20 steps scratch has hardly begun.
    workdir, _ = finished
    done = run(
        "-m", "jaxsft.train", "--config", f"{CONFIG}:sample", "--workdir", tmp_path / "scratch",
        "--config.train.epochs=2", "--config.model.weights=", optimised=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert records(workdir)[-1]["accuracy"] >= records(tmp_path / "scratch")[-1]["accuracy"] + 0.1


def test_evaluate_repeats_the_last_line(finished, tmp_path: Path) -> None:
    workdir, _ = finished
    status, printed, said = hear_command(f"evaluate --workdir {workdir} --json @/result.json", tmp_path)
    assert status == 0, said
    result, last = json.loads((tmp_path / "result.json").read_text()), records(workdir)[-1]
    assert printed.splitlines()[0].endswith(f"; {result['precision']}")
    assert result["precision"] == "float32 (auto), products in full"
    assert result["accuracy"] == last["accuracy"]
    assert result["top5"] == last["top5"]
    assert np.sum(result["confusion"]) == 1000
    assert np.trace(result["confusion"]) == round(1000 * last["accuracy"])


def test_two_runs_are_bit_equal(run, tmp_path: Path) -> None:
    """One in this process, which has done other things before, and one in its own."""
    small.run_here(tmp_path / "one", "--config.train.steps=4")
    done = run("-m", "jaxsft.train", *small.ARGUMENTS, "--config.train.steps=4", "--workdir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    first, second = (config_module.flatten(load_run(tmp_path / name).variables) for name in ("one", "two"))
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert np.asarray(leaf).tobytes() == np.asarray(second[path]).tobytes(), path


def test_real_cifar10_from_a_converted_directory_needs_neither_torch_nor_tensorflow(
    run, realdata: Path, tmp_path: Path
) -> None:
    weights, ported = tmp_path / "seven.pth", tmp_path / "ported"
    torch.save(small.in_torch(num_classes=7).state_dict(), weights)
    to_flax(str(weights), small.ARCH, ported)
    done = run(
        "-c", WATCHED, *small.ARGUMENTS, "--workdir", tmp_path / "run", f"--config.model.weights={ported}",
        "--config.data.source=tfds:cifar10", f"--config.data.data_dir={realdata / 'tfds'}",
        "--config.data.train_split=train[:300]+train[99%:]", "--config.data.eval_split=test[:90]",
        "--config.data.batch_size=80", "--config.train.epochs=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "its head of 7 classes" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: neither"
    last = records(tmp_path / "run")[-1]
    assert last["step"] == (300 + 500) // 80
    assert last["count"] == 90  # the last batch of 80 holds ten: counted once each


def test_without_a_network_one_line_names_the_ways_out(realdata: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for data_dir, missing in ((tmp_path / "empty", "tfds:cifar10"), (realdata / "tfds", "resnet18-f37072fd.pth")):
        status, said = run_command(
            f"train --config {CONFIG} --workdir @/run --config.data.data_dir={data_dir}"
            " --config.data.train_split=train[:200] --config.data.eval_split=test[:10]",
            tmp_path,
        )
        assert status == 2, said
        line = said.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert missing in line
        assert "could not be fetched" in line
        for way in ("configs/cifar10.py:sample", "model.weights=FILE", "data.data_dir=DIR"):
            assert way in line
        assert not (tmp_path / "run").exists()


def sample_config(**model: object):
    config = config_module.default()
    config.model.update({"arch": "resnet10_w16", "weights": "sample", **model})
    return config


SEVEN = tuple("abcdefg")


# (config.model.head, the weights' class names, whether their head is kept for SEVEN, what is said)
@pytest.mark.parametrize(
    ("head", "there", "kept", "said"),
    [
        ("auto", SEVEN, True, "its head of 7 classes kept, for they are the data's"),
        (
            "auto",
            SEVEN[::-1],
            False,
            "its head of 7 classes, which are not the data's, replaced; --config.model.head=keep keeps it",
        ),
        (
            "auto",
            None,
            False,
            "its head of 7 classes, whose names are not known, replaced; --config.model.head=keep keeps it",
        ),
        ("keep", None, True, "its head of 7 classes kept as config.model.head says"),
        ("keep", SEVEN[::-1], True, "its head of 7 classes kept as config.model.head says"),
        ("replace", SEVEN, False, "its head of 7 classes replaced by one of 7"),
    ],
)
def test_a_head_is_kept_where_its_classes_are_the_datas(head, there, kept, said) -> None:
    assert decide_head(head, ModelCard("resnet18", 7, there), 7, SEVEN) == (kept, said)


def test_what_is_kept_is_the_head_of_the_weights(tmp_path: Path) -> None:
    variables, card = load_pretrained("sample", "resnet10_w16")
    save(tmp_path / "port", variables, dataclasses.replace(card, class_names=SEVEN))
    source = load_file(SAMPLE)["fc.weight"].T
    for head, kept in (("auto", True), ("replace", False)):
        config = sample_config(head=head, weights=str(tmp_path / "port"))
        config.data.class_order = "numeric"
        _, variables, card, *_ = initial(config, SEVEN, load_pretrained)
        assert np.array_equal(variables["params"]["fc"]["kernel"], source) == kept
        assert (card.class_names, card.class_order) == (SEVEN, "numeric")
    # More outputs than the data has classes: whose they are is not known.
    _, _, card, line, *_ = initial(
        sample_config(weights=str(tmp_path / "port"), num_classes=7), SEVEN[:5], load_pretrained
    )
    assert "which are not the data's, replaced" in line
    assert card.class_names is None
    with pytest.raises(UserError, match="has a head of 7 classes; set --config.model.head=replace"):
        initial(sample_config(weights=str(tmp_path / "port"), head="keep"), tuple("abcdefghij"), load_pretrained)


def test_a_head_that_is_replaced_is_torchs_own_or_zeros() -> None:
    _, variables, _, said, _ = initial(sample_config(), tuple("abcdefghij"), load_pretrained)
    assert "its head of 7 classes replaced by one of 10" in said
    kernel = np.asarray(variables["params"]["fc"]["kernel"])
    assert kernel.shape == (128, 10)
    # torch's U(+-1/sqrt(128)), its deviation 1/sqrt(3 * 128): 1,280 draws know it to 2 %
    assert np.abs(kernel).max() <= 128**-0.5
    assert kernel.std() == pytest.approx((3 * 128) ** -0.5, rel=0.06)
    body = load_file(SAMPLE)["layer4.0.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(variables["params"]["layer4_0"]["conv2"]["kernel"], body)

    _, variables, *_ = initial(sample_config(head_init="zeros"), tuple("abcdefghij"), load_pretrained)
    assert not np.any(variables["params"]["fc"]["kernel"])


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(UserError, match="the data has 10 classes"):
        initial(sample_config(num_classes=9), tuple("abcdefghij"), load_pretrained)


def test_class_weights_are_one_a_class() -> None:
    config = sample_config()
    config.train.class_weights = (1.0, 2.0)
    with pytest.raises(UserError, match="class_weights has 2 numbers; give one for each of 10 classes"):
        initial(config, tuple("abcdefghij"), load_pretrained)


@pytest.mark.parametrize("backend", ["pmap", pytest.param("shard_map", marks=pytest.mark.full)])
def test_several_steps_a_call_are_the_same_steps(tmp_path: Path, backend: str) -> None:
    """Three at a call where nothing falls between: 1, 2-4, 5, 6-8, ..., for a line is due at every fourth."""
    options = ("--config.train.log_every_steps=4", "--config.checkpoint.every_steps=8")
    found = []
    for several in (1, 3):
        how = (f"--config.parallel.backend={backend}", f"--config.train.steps_per_call={several}")
        small.run_here(tmp_path / str(several), *options, *how)
        found.append(records(tmp_path / str(several)))
    assert [line["step"] for line in found[0]] == [line["step"] for line in found[1]]
    for one, three in zip(*found, strict=True):
        assert one.get("count") == three.get("count")
        # The same sums in another program; XLA may order them anew.
        assert one["loss"] == pytest.approx(three["loss"], rel=1e-4)
