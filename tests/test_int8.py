"""A run made smaller: in int8, nearly as right for the same input, or by a student; and what both are compared by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convert import names, reference
from jaxsft import config as config_module
from jaxsft import recipes
from jaxsft.bench import apart
from jaxsft.models.weights import ModelCard, Preprocessing, shapes
from jaxsft.parity import networks
from jaxsft.run import exported, quantised
from jaxsft.run.evaluation import evaluate_run, open_examples
from jaxsft.run.saved import Run, load_run
from jaxsft.ship import int8, runtime
from jaxsft.ship.onnx_file import to_onnx
from tests import narrow, small
from tests.commands import assert_refused, hear_command

SIDE = 32
reference.NOT_IN_TORCHVISION[small.ARCH] = small.in_torch


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps of the network of one block."""
    path = tmp_path_factory.mktemp("int8") / "run"
    small.run_here(path, "--config.train.steps=3")
    return path


@pytest.fixture(scope="module")
def run(workdir: Path) -> Run:
    return load_run(workdir)


@pytest.fixture(scope="module")
def files(run: Run) -> quantised.Files:
    """Both ONNX files of the run, which take uint8."""
    return quantised.onnx_files(run, inside=True)


def in_numpy(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A convolution of 1 px."""
    return np.einsum("nchw,oc->nohw", x, kernel[:, :, 0, 0]) + bias[:, None, None]


def network(resizes: bool = False) -> tuple[bytes, np.ndarray, np.ndarray]:
    """An ONNX file of two equal convolutions of 1 px on float32 [n, 3, 4, 4], and their kernel and bias.

    The channels of the kernel differ by a factor of ten thousand. With `resizes` a product comes before.
    """
    random = np.random.default_rng(0)
    kernel = (random.standard_normal((3, 3, 1, 1)) * np.array([1, 1e-2, 1e-4])[:, None, None, None]).astype(np.float32)
    bias = np.array([0.5, -0.5, 0], np.float32)
    first = "resized" if resizes else "images"
    nodes = [
        *([helper.make_node("MatMul", ["images", "rows"], ["resized"])] if resizes else []),
        helper.make_node("Conv", [first, "kernel", "bias"], ["between"], name="a" * 50, doc_string="b" * 500),
        helper.make_node("Conv", ["between", "again", "bias"], ["logits"]),
    ]
    constants = {"kernel": kernel, "again": kernel, "bias": bias, "unused": np.zeros(1000, np.float32)}
    constants |= {"rows": np.eye(4, dtype=np.float32)} if resizes else {}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"classes": '["a", "b", "c"]'})
    return model.SerializeToString(), kernel, bias


def test_what_is_computed_is_within_a_step_of_8_bits() -> None:
    model, kernel, bias = network()
    images = np.random.default_rng(1).uniform(-1, 1, (8, 3, 4, 4)).astype(np.float32)
    made = int8.quantised(model, [images[:4], images[4:]])
    found = runtime.program(made)(images)
    between = in_numpy(images, kernel, bias)
    expected = in_numpy(between, kernel, bias)
    for number in range(3):
        row = np.abs(kernel[number, :, 0, 0])
        # Half a step: of the input of 255 steps, of the weights of 128, of the output, one for all channels, of 255.
        step = (
            np.ptp(between) / 255 * row.sum() + row.max() / 128 * np.abs(between).sum(1).max() + np.ptp(expected) / 255
        )
        assert np.abs(found - expected)[:, number].max() <= step


def test_the_file_keeps_its_facts_and_holds_nothing_twice() -> None:
    model, *_ = network()
    made = onnx.load_from_string(int8.quantised(model, [np.ones((5, 3, 4, 4), np.float32)]))
    onnx.checker.check_model(made, full_check=True)
    said = {entry.key: entry.value for entry in made.metadata_props}
    assert said.pop("classes") == '["a", "b", "c"]'
    assert json.loads(said[int8.FACT])["calibrated_on"] == 5
    assert [value.name for value in (*made.graph.input, *made.graph.output)] == ["images", "logits"]
    weights = [
        numpy_helper.to_array(tensor) for tensor in made.graph.initializer if tensor.data_type == TensorProto.INT8
    ]
    kernels = [weight for weight in weights if weight.ndim == 4]
    assert len(kernels) == 1
    assert kernels[0].dtype == np.int8
    assert (np.abs(kernels[0]).max((1, 2, 3)) == 64).all()  # by channel: with one scale the small ones would be zeros
    assert np.abs(kernels[0]).max() == 64  # so that pairs of products fit in 16 bits, whatever the CPU adds them in
    assert all(len(name) <= 2 for node in made.graph.node for name in (*node.input, node.name) if name != "images")
    assert not any(node.doc_string for node in made.graph.node)
    assert {opset.domain for opset in made.opset_import} == {""}


def test_preprocessing_stays_in_float32() -> None:
    """A product that resizes, before the first convolution."""
    model, *_ = network(resizes=True)
    made = onnx.load_from_string(int8.quantised(model, [np.ones((2, 3, 4, 4), np.float32)]))
    (product,) = (node for node in made.graph.node if node.op_type == "MatMul")
    assert "images" in product.input
    assert sum(node.op_type == "Conv" for node in made.graph.node) == 2


def test_the_command_writes_what_onnx_would_take(workdir: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "tuned.int8.onnx"
    command = f"export --workdir {workdir} --format int8 --calibrate 24 --out {out}"
    status, heard, said = hear_command(command, tmp_path)
    assert status == 0, said
    assert re.search(r"0\.0\d MB, float32 0\.0\d MB .*; accuracy .* of 40\).*; float32 accuracy .* of 40\)", heard), (
        heard
    )
    logits = runtime.program(out)
    assert logits(np.zeros((3, 3, SIDE, SIDE), np.float32)).shape == (3, 10)
    facts = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(facts["classes"]) == list(run.card.names)
    assert json.loads(facts[int8.FACT])["calibrated_on"] == 24


def test_the_answers_are_the_runs(run: Run, files: quantised.Files) -> None:
    """In float32 the same numbers as evaluation, for at 32 px pixels are whole; in int8 the loss within a hundredth."""
    cost = quantised.cost(run, files)
    own = evaluate_run(run, open_examples(run))
    assert cost.before.accuracy == own.accuracy
    assert cost.before.count == cost.after.count == 40
    assert cost.before.loss == pytest.approx(own.loss, rel=1e-5)  # float32
    assert cost.after.loss == pytest.approx(own.loss, rel=1e-2)
    assert cost.after.loss != cost.before.loss
    made = onnx.load_from_string(files.int8)
    assert [node.op_type for node in made.graph.node if "logits" in node.output] == ["Gemm"]  # not rounded to 255 steps
    assert (cost.bytes_before, cost.bytes_after) == (len(files.floats), len(files.int8))


def test_it_is_calibrated_on_training_images_evenly_and_the_same_each_time(run: Run) -> None:
    taken = [np.concatenate(list(quantised.calibrating(run, 8, quantised.levels))) for _ in range(2)]
    np.testing.assert_array_equal(*taken)
    (every,) = exported.batches(exported.training_examples(run, 16))  # of 64, one batch
    assert taken[0].shape == (8, SIDE, SIDE, 3)
    np.testing.assert_array_equal(taken[0], quantised.levels(every["image"][::2]))
    found = sum(int(batch["mask"].sum()) for batch in exported.batches(exported.training_examples(run, 1000)))
    assert found == 64


class Here(apart.Contestant):
    """A contestant in this process."""

    def __init__(self, make: Callable, *arguments: Any):
        self.call = make(*arguments)

    def timed(self, count: int, *arguments: Any) -> tuple[float, Any]:
        return 1.0, self.call(*arguments)

    def close(self) -> None:
        pass


def test_forms_are_compared_in_one_table(workdir: Path, files: quantised.Files, tmp_path: Path, monkeypatch) -> None:
    """They are as right as each other in float32, and int8 nearly."""
    monkeypatch.setattr(quantised, "onnx_files", lambda *_, **__: files)  # exporting them again takes seconds
    monkeypatch.setattr(apart, "Contestant", Here)  # another process would not know this network
    record = tmp_path / "table.json"
    command = f"bench ship --workdir {workdir} --rounds 1 --seconds 0.001 --calibrate 8 --json {record}"
    status, heard, said = hear_command(command, tmp_path)
    assert status == 0, said
    assert "int8" in heard
    found = json.loads(record.read_text())
    assert found["threads"] >= 1
    assert [row["form"] for row in found["rows"]] == [
        "jaxsft float32", "torch float32", "onnxruntime float32", "onnxruntime int8",
    ]  # fmt: skip
    for row in found["rows"]:
        assert abs(row["accuracy"] - found["rows"][0]["accuracy"]) <= (0.05 if "int8" in row["form"] else 0)  # of 40
        assert row["latency_ms"] > 0 and row["images_per_sec"] > 0
        assert (row["arch"], row["image_size"]) == (small.ARCH, SIDE)
    *_, floats, made = found["rows"]
    assert made["bytes"] < floats["bytes"] < found["rows"][0]["bytes"] * 1.5


def test_a_student_is_the_config_of_a_smaller_network_and_a_teacher(workdir: Path, tmp_path: Path) -> None:
    """The recipe that ships, on the sample and on a network of one block."""
    config = recipes.load("distill")
    assert (config.model.arch, config.train.teacher) == ("mobilenet_v3_small", "runs/cifar10")
    assert recipes.load("distill:shufflenet_v2_x0_5").model.arch == "shufflenet_v2_x0_5"
    config = recipes.load("configs/distill.py:resnet10_w16")
    assert (config.model.weights, config.data.image_size) == ("sample", SIDE * 2)
    config.model.update({"arch": small.ARCH, "weights": ""})
    config.data.update({"source": "sample", "train_split": "train[:64]", "eval_split": "test[:40]", "batch_size": 16})
    config.data.image_size = SIDE
    config.train.update({"teacher": str(workdir), "steps": 3})
    config.optim.warmup_epochs = 0.5
    config_module.check(config)
    small.train_here(config, tmp_path / "student")
    assert load_run(tmp_path / "student").step == 3


@pytest.mark.full
def test_the_sample_is_within_a_point_and_smaller_by_three_and_a_half(tmp_path: Path) -> None:
    """The recipe that ships, on its 1,000 test images; half a point is their noise: one answer in fifty changes."""
    small.train_here(recipes.load("cifar10:sample"), tmp_path / "run")
    run = load_run(tmp_path / "run")
    for inside in (False, True):
        cost = quantised.cost(run, quantised.onnx_files(run, inside=inside))
        assert cost.before.count == 1000
        assert cost.before.accuracy > 0.74
        assert abs(cost.points) <= 1
        assert cost.bytes_before >= 3.5 * cost.bytes_after


@pytest.mark.full
@pytest.mark.parametrize("arch", sorted(narrow.NARROW))
def test_every_family_can_be_quantised(arch: str) -> None:
    """Logits within a tenth of the largest, of weights drawn so that each shows, but for two."""
    network = networks.build(arch, 10, image_size=SIDE)
    tensors = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    card = ModelCard(arch, 10, preprocessing=Preprocessing(SIDE, SIDE))
    variables = names.to_flax(tensors, shapes(card), arch)
    images = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), np.uint8)
    floats = to_onnx(variables, card, inside=True)
    made = int8.quantised(floats, [images])
    expected, found = (runtime.program(file)(images) for file in (floats, made))
    # Drawn weights are harder than trained ones. Measured with a margin: transformers multiply activations of 8 bits by
    # each other, ViT is 0.13 off and Swin v2 0.31; all others are within a tenth.
    tolerance = {"narrow_vit": 0.2, "narrow_swin_v2": 0.4}.get(arch, 0.1)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    assert len(made) < len(floats)


REFUSED = (
    ("int8 --out @/x.onnx", "--out @/x.onnx is no name for --format int8; let it end in .int8.onnx"),
    ("onnx --out @/x.int8.onnx", "--out @/x.int8.onnx is no name for --format onnx; ..."),
    ("int8 --out @/x.int8.onnx --calibrate 0", "argument --calibrate: 0 is not 1 or more; ..."),
    ("onnx --out @/x.onnx --calibrate 9", "--format onnx has no --calibrate; leave it out; it is for int8"),
    ("int8 --out @/x.int8.onnx --image-size 9x9", "--format int8 has no --image-size; ..."),
)


@pytest.mark.parametrize(("options", "expected"), REFUSED)
def test_wrong_input_is_said_in_one_line(options: str, expected: str, workdir: Path, tmp_path: Path) -> None:
    assert_refused(f"export --workdir {workdir} --format {options}", expected, tmp_path)
    assert not list(tmp_path.iterdir())
