"""Weights as training scripts leave them: read by content in every usual layout, and refused where they are none."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from convert import checkpoints
from convert.__main__ import to_flax, to_torch, verify
from jaxsft import checkpoint, runs, weights
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.initial import initial
from jaxsft.state import TrainState
from jaxsft.weights import SAMPLE, ModelCard

ARCH = "resnet10_w16"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(SAMPLE)


def behind(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in tensors.items()}


LAYOUTS = {
    "reference script": lambda t: {"model": t, "optimizer": {}, "args": argparse.Namespace(lr=0.1), "epoch": 3},
    "reference script with its average": lambda t: {
        "model": t, "model_ema": behind("module.", {"n_averaged": torch.tensor(3), **{k: 0 * v for k, v in t.items()}}),
    },
    "the average alone": lambda t: {"model_ema": {"n_averaged": torch.tensor(3), **behind("module.", t)}},
    "torch.compile": lambda t: behind("_orig_mod.", t),
    "compiled, then DataParallel": lambda t: behind("module._orig_mod.", t),
    "DataParallel, then compiled": lambda t: behind("_orig_mod.module.", t),
    "AveragedModel": lambda t: {"n_averaged": torch.tensor(7), **behind("module.", t)},
    "a numpy number beside": lambda t: {"state_dict": t, "accuracy": np.float64(0.9), "epoch": np.int64(3)},
    "numbers among them": lambda t: {**t, "epoch": 3, "best": None},
    "model_state_dict": lambda t: {"model_state_dict": t, "loss": torch.tensor(0.5)},
    "net": lambda t: {"net": t, "acc": 95.0, "epoch": 3},
    "nested": lambda t: {"state_dict": {"model": t}},
    "model.": lambda t: behind("model.", t),
    "backbone.": lambda t: {"state_dict": behind("backbone.", t)},
    "encoder.": lambda t: behind("module.encoder.", t),
    "two": lambda t: behind("model.backbone.", t),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tensors, tmp_path: Path, layout: str) -> None:
    torch.save(LAYOUTS[layout](tensors), tmp_path / "a.pth")
    found, card = checkpoints.read(str(tmp_path / "a.pth"), ARCH)
    assert card.num_classes == 7
    assert found.keys() == tensors.keys()
    assert all(found[name].tobytes() == value.numpy().tobytes() for name, value in tensors.items())


@pytest.mark.parametrize("ending", [".pth.tar", ".ckpt", ".bin", ".PTH", ".safetensors", ""])
def test_a_file_is_known_by_its_content(tensors, tmp_path: Path, ending: str) -> None:
    torch.save(tensors, tmp_path / f"a{ending}")
    torch.save(tensors, tmp_path / f"old{ending}", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, tmp_path / f"b{ending}")
    for path in tmp_path.iterdir():
        found, _ = checkpoints.read(str(path), ARCH)
        assert found.keys() == tensors.keys(), path


def changed(name: str, value: Any) -> Any:
    return lambda t: {**t, name: value(t[name]) if callable(value) else value}


def first(number: float, dtype: torch.dtype = torch.float32) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(dtype, copy=True)
        tensor.view(-1)[0] = number
        return tensor

    return change


WRONG = {
    "NaN": (changed("conv1.weight", first(float("nan"))), "conv1.weight holds NaN or infinity"),
    "infinity": (changed("fc.bias", first(float("-inf"))), "fc.bias holds NaN or infinity"),
    "infinite in float32": (changed("fc.bias", first(1e300, torch.float64)), "fc.bias holds NaN or infinity"),
    "complex": (changed("fc.bias", lambda t: t.to(torch.complex64)), "fc.bias is of complex64"),
    "integers": (changed("fc.bias", lambda t: t.to(torch.int64)), "fc.bias is of int64, not of floating-point"),
    "booleans": (changed("fc.bias", lambda t: t > 0), "fc.bias is of bool"),
    "a negative variance": (changed("bn1.running_var", first(-1e-3)), "bn1.running_var holds a negative variance"),
    "a negative count": (changed("bn1.num_batches_tracked", torch.tensor(-1)), "num_batches_tracked is -1, no count"),
    "a broken count": (changed("bn1.num_batches_tracked", torch.tensor(1.5)), "num_batches_tracked is 1.5, no count"),
    "one name twice": (lambda t: {**t, "module.fc.bias": t["fc.bias"]}, "'fc.bias' twice, once as 'module.fc.bias'"),
    "sparse": (changed("fc.weight", lambda t: t.to_sparse()), "fc.weight is sparse"),
    "quantised": (
        changed("fc.weight", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)), "fc.weight is quantised",
    ),
    "without data": (changed("fc.weight", lambda t: t.to("meta")), "fc.weight is without data"),
    "nested": (changed("fc.weight", lambda t: torch.nested.nested_tensor([t[0], t[1]])), "fc.weight is nested"),
    "expanded": (changed("fc.bias", torch.ones(1).expand(1 << 32)), "fc.bias is a view that asks for 16.0 GiB"),
    "no tensor": (changed("fc.bias", "x"), "'fc.bias' is a str, not a tensor"),
    "nothing": (lambda t: {"epoch": 3}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize", "ignore:.*prototype")
@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_weight_is_refused_by_name(tensors, tmp_path: Path, what: str) -> None:
    change, said = WRONG[what]
    torch.save(change(dict(tensors)), tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        checkpoints.read(str(tmp_path / "a.pth"), ARCH)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_eight_bit_floats_are_read_exactly_or_refused(tensors, tmp_path: Path) -> None:
    narrow = {**tensors, "fc.bias": tensors["fc.bias"].to(torch.float8_e4m3fn)}
    torch.save(narrow, tmp_path / "a.pth")
    found, _ = checkpoints.read(str(tmp_path / "a.pth"), ARCH)
    np.testing.assert_array_equal(found["fc.bias"], narrow["fc.bias"].float().numpy())
    safetensors.torch.save_file(narrow, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a.safetensors holds a dtype that can't be read \(float8_e4m3fn\); save"):
        checkpoints.read(str(tmp_path / "a.safetensors"), ARCH)


class Runs:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("true",)


def test_a_refusal_gives_no_advice_to_run_code(tensors, tmp_path: Path) -> None:
    for name, value in (("code", Runs()), ("module", torch.nn.Linear(2, 2))):
        torch.save({**tensors, "extra": value}, tmp_path / f"{name}.pth")
        with pytest.raises(UserError) as error:
            checkpoints.read(str(tmp_path / f"{name}.pth"), ARCH)
        said = str(error.value)
        assert "is refused, it is damaged or holds more than weights: it names " in said
        assert not any(word in said for word in ("weights_only", "safe_globals", "trust", "allowlist"))


@pytest.mark.parametrize("name", ["ResNet18_Weights.IMAGENET1K_V1", "resnet18_weights.imagenet1k_v1", "imagenet1k_v1",
                                  "default"])  # fmt: skip
def test_registry_names_in_any_case(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []

    def download(url: str, folder: Path) -> Path:
        asked.append(url)
        raise UserError("no network", "none")

    monkeypatch.setattr(checkpoints, "download", download)
    with pytest.raises(UserError, match="no network"):
        checkpoints.read(name, "resnet18")
    assert asked[0].endswith("resnet18-f37072fd.pth")
    with pytest.raises(UserError, match=r"is not of resnet34|no network"):
        checkpoints.read(name, "resnet34")


def test_weights_without_a_head_are_given_one(tensors, tmp_path: Path, capsys) -> None:
    body = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    torch.save(behind("backbone.", body), tmp_path / "body.pth")
    to_flax(str(tmp_path / "body.pth"), ARCH, tmp_path / "port")
    assert "no head" in capsys.readouterr().out
    variables, card = weights.load(tmp_path / "port")
    assert card.num_classes == 0 and "fc" not in variables["params"]
    config = config_module.default()
    config.model.update({"arch": ARCH, "weights": str(tmp_path / "port")})
    _, variables, card, said = initial(config, ("a", "b", "c"))
    assert variables["params"]["fc"]["kernel"].shape == (128, 3)
    assert "which has no head, with one of 3 classes" in said
    assert verify(tmp_path / "port", str(tmp_path / "body.pth"), 64) == 0
    to_torch(tmp_path / "port", tmp_path / "again.pth")
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == body.keys()
    config.model.head = "keep"
    with pytest.raises(UserError, match="config.model.head is 'keep', but body.pth has 0 classes, not 3"):
        initial(config, ("a", "b", "c"))


NAMES = tuple("abcdefg")
HEADS = (  # (model.head, the names that the weights' classes have, whether the head is kept)
    ("auto", NAMES, True),
    ("auto", NAMES[::-1], False),
    ("auto", None, False),
    ("keep", None, True),
    ("keep", NAMES[::-1], True),
    ("replace", NAMES, False),
)


@pytest.mark.parametrize(("head", "names", "kept"), HEADS)
def test_a_head_is_kept_by_the_names_of_its_classes(tmp_path: Path, head: str, names: Any, kept: bool) -> None:
    shutil.copytree(weights.port("sample", ARCH), tmp_path / "port")
    card = json.loads((tmp_path / "port" / "model.json").read_text())
    (tmp_path / "port" / "model.json").write_text(json.dumps({**card, "class_names": names}))
    config = config_module.default()
    config.model.update({"arch": ARCH, "weights": str(tmp_path / "port"), "head": head})
    config.data.class_order = "numeric"
    _, variables, card, said = initial(config, NAMES)
    before, _ = weights.load(tmp_path / "port")
    same = np.array_equal(variables["params"]["fc"]["kernel"], before["params"]["fc"]["kernel"])
    assert same == kept
    assert ("kept" in said) == kept
    assert ("whose names are not known" in said) == (head == "auto" and names is None)
    assert (card.class_names, card.class_order) == (NAMES, "numeric")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The directory of a run of two checkpoints, the second of zeros."""
    path = tmp_path_factory.mktemp("tuned") / "run"
    variables, card = weights.load(weights.port("sample", ARCH))
    path.mkdir()
    weights.dataclasses.replace(card, class_names=NAMES).save(path)
    config = config_module.default()
    config.model.arch, config.checkpoint.best_metric = ARCH, "loss"
    (path / "config.json").write_text(config_module.to_json(config))
    lines = [{"step": step, "split": "eval", "loss": loss} for step, loss in ((1, 0.1), (2, 0.2))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with checkpoint.Checkpoints(path, 9) as checkpoints_:
        for step in (1, 2):
            state = TrainState(np.int32(step), variables["params"], variables["batch_stats"], ())
            checkpoints_.save(state, step, {"config": config.to_dict()})
            variables = jax.tree.map(np.zeros_like, variables)
    return path


def test_a_run_is_weights_too(tuned: Path) -> None:
    config = config_module.default()
    config.model.update({"arch": ARCH, "weights": str(tuned)})
    found = {}
    for which in ("last", "best", "1"):
        config.model.checkpoint = which
        _, variables, card, said = initial(config, NAMES)
        found[which] = float(np.abs(variables["params"]["fc"]["kernel"]).max())
        assert "kept" in said
        assert card.source == f"run at step {2 if which == 'last' else 1}"
    assert found["last"] == 0 < found["best"] == found["1"]
    config.model.arch = "resnet18"
    with pytest.raises(UserError, match=f"holds a {ARCH}; set --config.model.arch={ARCH}"):
        initial(config, NAMES)


def test_a_damaged_port_in_the_cache_is_made_anew(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = weights.port("sample", ARCH)
    for file in (directory / "weights").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match="can't be read"):
        weights.load(directory)
    variables, _ = weights.load_or_port("sample", ARCH)
    assert "they are ported anew" in capsys.readouterr().err
    assert variables["params"]["fc"]["kernel"].shape == (128, 7)
    weights.load(directory)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    variables, card = weights.load_or_port("sample", ARCH)
    assert (card.num_classes, variables["params"]["fc"]["kernel"].shape) == (7, (128, 7))
    assert "can't be written: Not a directory: the weights are ported for this run alone" in capsys.readouterr().err


CARD = {"arch": ARCH, "num_classes": 2, "class_names": ["a", "b"], "source": "", "sha256": "", "weights_version": "",
        "preprocessing": {"resize_size": 64, "crop_size": 64, "mean": [0, 0, 0], "std": [1, 1, 1],
                          "interpolation": "bilinear"}}  # fmt: skip
FOREIGN = (
    [], 3, None, {}, {**CARD, "arch": ["resnet18"]}, {**CARD, "num_classes": True}, {**CARD, "num_classes": 2.0},
    {**CARD, "num_classes": 10**40}, {**CARD, "class_names": "ab"}, {**CARD, "class_names": [1, 2]},
    {**CARD, "class_names": {"a": 1, "b": 2}}, {**CARD, "source": ["x"]}, {**CARD, "preprocessing": []},
    {**CARD, "preprocessing": {**CARD["preprocessing"], "mean": [0, 0, "x"]}},
    {**CARD, "preprocessing": {**CARD["preprocessing"], "mean": 0.5}},
    {**CARD, "preprocessing": {**CARD["preprocessing"], "std": [1, 1, float("nan")]}},
    {**CARD, "preprocessing": {**CARD["preprocessing"], "resize_size": True}},
    {**CARD, "preprocessing": {**CARD["preprocessing"], "crop_size": 10**30}}, {**CARD, "more": 1},
    {**CARD, "class_order": 3},
)  # fmt: skip


@pytest.mark.parametrize("content", [*map(json.dumps, FOREIGN), "[" * 100_000, "\x00", ""])
def test_a_foreign_card_is_refused_in_a_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.json").write_text(json.dumps(CARD))
    assert ModelCard.load(tmp_path).class_order == "text"  # of before there was such a field
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(UserError, match="is not a model card"):
        ModelCard.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"optim": 3}', '{"optimizer": {"lr": 1}}', '{"seed": "x"}', "{" * 9, ""]
)
def test_a_foreign_config_is_refused_in_a_line(tuned: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json (is no config of this program|can't be read|holds no object)"):
        runs.read_config(tmp_path)
