"""What exports are made of: the card, config.json, the facts, the comparison; and ONNX for every family."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict
from torchvision.models import list_models

import jaxsft
from convert import names
from jaxsft import config as config_module
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import variable_shapes
from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.parity import networks
from jaxsft.run.model_card import changed
from jaxsft.ship import card as card_module
from jaxsft.ship import check, hf, onnx_file
from jaxsft.ship.facts import as_text, facts, weights_sha256
from tests import narrow

HOSTILE = (
    "---", "a\n---\nb: c", 'quo"te', "it's", "pi|pe", "<script>alert(1)</script>", "# head", "`code`", "```", "{x: 1}",
    "*bold*", "[a](http://b)", "!!python/object:os.system", "\x1b[31m", "caf\u00e9 \U0001f600", "\udc80\udcff", "&amp;",
    "\u202eright to left", "null", "| | |",
)  # fmt: skip


def facts_of(**more: Any) -> card_module.Facts:
    """Of a small run of two classes, and what a test changes."""
    config = config_module.default()
    config.data.source = "sample"
    record = {"split": "eval", "step": 7, "epoch": 2.0, "accuracy": 0.75, "count": 8, "loss": 0.5, "top5": 1.0}
    found = {
        "title": "run",
        "config": config,
        "changed": changed(config),
        "card": ModelCard("resnet18", 2, ("a", "b"), "resnet18-f37072fd.pth", "f370", "IMAGENET1K_V1"),
        "sha256": "abc",
        "step": 7,
        "data": {"classes": ["a", "b"], "train": {"images": 5, "sha256": "t1"}, "eval": {"images": 8, "sha256": "e1"}},
        "records": [{**record, "step": 3}, {**record, "per_class": {"a": 0.5, "b": 1.0}, "final": True}],
        "precision": "float32, products in full",
        "versions": {"jax": "0.10.2"},
        "parameters": 1234567,
    }
    return card_module.Facts(**{**found, **more})


def parsed(text: str) -> huggingface_hub.ModelCard:
    """As the hub reads it; what we put before the text is what it finds there."""
    card = huggingface_hub.ModelCard(text)
    assert yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n")) == card.data.to_dict()
    return card


def test_a_card_tells_what_the_run_knows() -> None:
    text = card_module.model_card(facts_of())
    card = parsed(text)
    assert card.data.library_name == "jaxsft"
    assert (card.data.metrics, card.data.datasets, card.data.base_model) == (["accuracy"], None, None)
    (accuracy, top5) = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_name) == ("accuracy", 0.75, "sample")
    assert (top5.metric_name, top5.metric_value) == ("top-5", 1.0)
    for part in (
        "6 of 8 (75.0 %)", "| b | 1.0000 |", "1,234,567", "resnet18-f37072fd.pth IMAGENET1K\\_V1", "| f370 |",
        "| abc |", "5 images, fingerprint t1", "8 images, fingerprint e1", "float32, products in full", "jax 0.10.2",
        "(2 evaluations in the run)", "no temperature was fitted", "softmax of logits |",
    ):  # fmt: skip
        assert part in text, part


def test_a_step_that_was_not_evaluated_has_no_result() -> None:
    text = card_module.model_card(facts_of(step=5))
    assert "model-index" not in parsed(text).data.to_dict()
    assert "Step 5 was not evaluated." in text and "75.0" not in text and "The accuracy at step 5" in text


def test_other_runs_tell_other_things() -> None:
    config = config_module.default()
    config.data.source, config.checkpoint.best_metric = "hf:cifar10:plain", "accuracy"
    config.train.ema = 0.99
    several = {"accuracy": 0.5, "count": 4, "loss": 1.0, "map": 0.625, "f1_micro": 0.25, "f1_macro": 0.5}
    record = {"split": "eval", "step": 7, "epoch": 1.0, **several, "per_class": {"a": None, "b": 0.625}}
    labels = ModelCard("resnet18", 2, ("a", "b"), multi_label=True, temperature=1.5)
    text = card_module.model_card(facts_of(config=config, card=labels, records=[record], data={}, precision=""))
    data = parsed(text).data
    assert (data.metrics, data.datasets) == (["accuracy", "f1"], ["cifar10"])
    assert [found.metric_type for found in data.eval_results] == ["accuracy", "f1", "mAP"]
    assert "temperature was fitted" not in text and "sigmoid of logits / 1.5" in text and "| a | no examples |" in text
    assert "random values" in text and "the best step by accuracy" in text and "the average that the run keeps" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_strangers_change_no_structure(name: str) -> None:
    plain_card = card_module.model_card(facts_of())
    config = config_module.default()
    config.data.source, config.data.eval_split = f"hf:{name}", name
    model = ModelCard("resnet18", 2, (name, "b"), name, name, name)
    records = [{**facts_of().records[1], "per_class": {name: 0.5, "b": 1.0}}]
    text = card_module.model_card(
        facts_of(title=name, config=config, changed=changed(config), card=model, records=records, precision=name)
    )
    card = parsed(text)
    assert card.data.pipeline_tag == "image-classification" and len(card.data.eval_results) == 2
    assert card.data.model_name == jaxsft.cli.printable(name)
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body.split("```")[0]  # in a block of code it is text
    assert [line for line in body.splitlines() if line.startswith("#")][1:] == [
        line for line in plain_card.splitlines() if line.startswith("#") and line != "# run"
    ]
    for line in body.splitlines():
        if line.startswith("|"):
            assert len(line.replace("\\|", "").split("|")) == 4, line  # two cells
    assert text.encode()  # as UTF-8
    assert config_of(text) == config


def config_of(text: str) -> ConfigDict:
    """What the config file in a card makes."""
    block = text[text.index("python\nfrom jaxsft") :]
    program, place = block.removeprefix("python\n"), {}
    exec(program[: program.index("    return config") + len("    return config")], place)
    return place["get_config"]()


def test_folders_of_the_machine_stay_out() -> None:
    config = config_module.default()
    config.data.source, config.data.data_dir, config.model.weights = "folder:/home/eve/pets", "/mnt/x/tf", "/srv/a.pth"
    text = card_module.model_card(facts_of(config=config, changed=changed(config)))
    assert not any(part in text for part in ("/home", "eve", "/mnt", "/srv"))
    assert "folder:pets" in text and "once its paths" in text
    config.data.source, config.data.data_dir, config.model.weights = "folder:pets", "tf", "a.pth"
    assert config_of(text) == config


def test_many_classes_are_folded() -> None:
    listed = tuple(f"class {n}" for n in range(60))
    record = {**facts_of().records[1], "per_class": dict.fromkeys(listed, 0.5)}
    text = card_module.model_card(facts_of(card=ModelCard("resnet18", 60, listed), records=[record]))
    assert "<details><summary>accuracy of 60 classes" in text and "the 60 of the table above" in text
    assert text.count("class 59") == 1


@pytest.mark.parametrize("crop", [32, 64, 176, 224, 299, 384])
def test_timm_resizes_to_what_we_do(crop: int) -> None:
    for resize in range(crop, 2 * crop):
        share = hf.crop_share(Preprocessing(resize, crop))
        assert math.floor(crop / share) == resize and share == pytest.approx(crop / resize, rel=1e-12)


def test_the_library_is_one_that_has_these_tensors() -> None:
    found = {arch: hf.library(arch) for arch in ("resnet18", "vgg11_bn", "densenet161", "swin_t", "resnet10_w16")}
    assert found == dict(zip(found, ("timm", "timm", "timm", "torchvision", "torchvision"), strict=True))
    assert 'create_model("local-dir:FOLDER"' in hf.usage(ModelCard("resnet18", 3))
    of_vit = hf.usage(ModelCard("vit_b_32", 3, preprocessing=Preprocessing(64, 64)))
    assert "torchvision.models.vit_b_32(num_classes=3, image_size=64)" in of_vit


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d", "densenet121", "vgg11_bn"])
def test_timm_loads_the_folder(arch: str, tmp_path: Path) -> None:
    import timm
    import torch

    model = model_of(arch, 64)
    hf.write(tmp_path, *model)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert theirs.pretrained_cfg["label_names"] == list(model.card.names)
    images = pictures(64)
    with torch.no_grad():
        x = torch.from_numpy(check.prepared(model.card, images).transpose(0, 3, 1, 2).copy())
        check.agreement(check.logits(model, images), theirs(x).numpy(), model.card, check.TOLERANCE, "timm")
    data = timm.data.resolve_model_data_config(theirs)
    resize, crop, *_ = timm.data.create_transform(**data, is_training=False).transforms
    assert (resize.size, tuple(crop.size)) == (72, (64, 64))


def test_the_sha256_is_of_names_shapes_dtypes_and_values() -> None:
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.int64(7)}
    others = (
        tensors,
        {**tensors, "a": np.zeros((3, 2), np.float32)},
        {**tensors, "a": np.zeros((2, 3), np.int32)},
        {**tensors, "b": np.int64(8)},
        {"a": tensors["a"], "c": tensors["b"]},
    )
    assert len({weights_sha256(found) for found in others}) == len(others)
    assert weights_sha256(dict(reversed(tensors.items()))) == weights_sha256(tensors)
    assert weights_sha256({"a": np.zeros((3, 2), np.float32).T, "b": np.int64(7)}) == weights_sha256(tensors)


AGREEMENTS = (
    ([[1.0, -2.0]], [[1.0, -2.0 + 1e-5]], False, ""),
    ([[1.0, -2.0]], [[1.0, -2.0 + 3e-5]], False, "does not agree"),
    ([[1.0, -2.0]], [[1.0, np.nan]], False, "does not agree"),
    ([[1.0, -2.0]], [[1.0]], False, "does not agree"),
    ([[0.0, 0.0]], [[0.0, 0.0]], False, ""),
    ([[0.0, 0.0]], [[0.0, 2e-5]], False, "does not agree"),
    ([[1.0, np.inf]], [[1.0, np.inf]], False, "computes no numbers"),
)


@pytest.mark.parametrize(("expected", "found", "multi_label", "said"), AGREEMENTS)
def test_logits_agree_or_not(expected: list, found: list, multi_label: bool, said: str) -> None:
    card = ModelCard("resnet18", 2, multi_label=multi_label)
    arguments = (np.array(expected), np.array(found), card, 1e-5, "a")
    if said:
        with pytest.raises(jaxsft.Stop, match=said):
            check.agreement(*arguments)
    else:
        assert "the same answer for 1 of 1 images, by a" in str(check.agreement(*arguments))


def test_answers_are_counted() -> None:
    logits, other = np.array([[1.0, 2.0], [3.0, -4.0]]), np.array([[2.0, 1.0], [3.0, 4.0]])
    for multi_label, same in ((False, 0), (True, 1)):
        card = ModelCard("resnet18", 2, multi_label=multi_label)
        assert check.agreement(logits, other, card, 9.0, "a").agreeing == same


def test_facts_are_ascii_whatever_classes_are_called() -> None:
    variables = {"params": {"fc": {"bias": np.zeros(2, np.float32)}}}
    said = as_text(facts(variables, ModelCard("resnet18", 2, ("\udc80", '"|\n'), source="\udc80"), 3))
    assert all(value.isascii() for value in said.values())
    assert json.loads(said["classes"]) == ["\udc80", '"|\n']


def model_of(arch: str, size: int) -> check.Model:
    """A network with values that show."""
    classes = ("a", "b", "c")
    network = networks.build(arch, len(classes), image_size=size)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    card = ModelCard(arch, len(classes), classes, preprocessing=Preprocessing(size * 9 // 8, size))
    shapes = variable_shapes(ARCHITECTURES[arch](num_classes=len(classes)), size)
    return check.Model(names.to_flax(tensors, shapes, arch), card, 3)


def pictures(size: int) -> check.Pictures:
    """Noise, cropped."""
    return check.Pictures(np.random.default_rng(0).integers(256, size=(4, size, size, 3), dtype=np.uint8), True)


FAMILIES = (
    "resnet18", "vgg11", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "densenet121",
    "shufflenet_v2_x0_5", "convnext_tiny", "vit_b_32", "swin_t",
)  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("arch", [*FAMILIES, *narrow.NARROW])
def test_onnx_of_every_family_gives_our_logits(arch: str, tmp_path: Path) -> None:
    size = 64 if arch in list_models() else narrow.SIDE
    model = model_of(arch, size)
    for inside in (False, True) if arch in narrow.NARROW else (False,):
        path = tmp_path / f"{inside}.onnx"
        path.write_bytes(onnx_file.to_onnx(model.variables, model.card, inside=inside, step=model.step))
        said = check.check_onnx(path, model, pictures(size), inside=inside)
        assert "the same answer for 4 of 4" in said
        print(arch, said)
