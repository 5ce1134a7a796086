"""A head that is trained alone: what comes into it, on features that are kept and through the network, and LP-FT."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsft import config as config_module
from jaxsft.cli import Stop, UserError
from jaxsft.data.base import Arrays
from jaxsft.data.loader import BadFiles
from jaxsft.learn.features import make_features_step
from jaxsft.learn.objective import Inputs, Objective
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import make_schedule
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_train_step
from jaxsft.models import convolution, layers
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import init_variables, variable_shapes
from jaxsft.models.head import Head, entering, head_of
from jaxsft.models.initial import frozen_patterns
from jaxsft.models.layers import Conv, Linear
from jaxsft.models.weights import ModelCard, Preprocessing, save
from jaxsft.parity import compare, networks, oracle, ours
from jaxsft.parity.__main__ import precision
from jaxsft.parity.compare import Options
from jaxsft.run import checkpoint, features, prepare
from jaxsft.run.evaluation import evaluate_run, open_examples
from jaxsft.run.features import Keeper
from jaxsft.run.parallel import DataParallel
from jaxsft.run.saved import load_run
from tests import small, tiny
from tests.narrow import NARROW, SIDE
from tests.tiny import Tiny, compiled

CLASSES = 10
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}  # float64 sums in another order
# What is compiled by default: what comes into the others' heads is pooled alike.
COMPILED = ("narrow_vgg_bn", "narrow_mobilenet_v3", "narrow_convnext", "narrow_vit", "narrow_swin_v2")
# What drops right before the head, by torch's name.
DROPS = {"narrow_vgg": ("classifier.5", 0.5), "narrow_vgg_bn": ("classifier.5", 0.5),
         "narrow_mobilenet_v2": ("classifier.0", 0.2), "narrow_mobilenet_v3": ("classifier.2", 0.2),
         "narrow_efficientnet": ("classifier.0", 0.2), "narrow_efficientnet_v2": ("classifier.0", 0.2)}  # fmt: skip


@pytest.mark.parametrize("arch", [a if a in COMPILED else pytest.param(a, marks=pytest.mark.full) for a in NARROW])
def test_features_are_what_comes_into_torchs_head(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "conv2d", convolution.plain)
    with precision("float64"):
        torch_model = networks.build(arch, CLASSES, image_size=SIDE).double().eval()
        model = compare.model_for(Options(arch, "float64", image_size=(SIDE, SIDE)), CLASSES)
        values = ours.variables(model, oracle.state(torch_model), arch, (SIDE, SIDE))
        images = np.random.default_rng(0).standard_normal((2, SIDE, SIDE, 3))
        into: list[torch.Tensor] = []
        path = family_of(arch).head
        torch_model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: into.append(inputs[0]))
        with torch.no_grad():
            logits = torch_model(oracle.nchw(images)).numpy()
        found = compiled(lambda v, x: entering(model, path, v, x).features)(values, images)
        # a network of float64 in other sums
        np.testing.assert_allclose(found, into[0].numpy(), rtol=1e-8, atol=1e-10)
        head = head_of(model, path, values, SIDE)
        np.testing.assert_allclose(head.apply(values, found, train=False), logits, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("arch", NARROW)
def test_the_head_is_found_with_the_dropout_before_it(arch: str) -> None:
    model = ARCHITECTURES[arch](num_classes=CLASSES)
    head = head_of(model, family_of(arch).head, variable_shapes(model, SIDE), SIDE)
    assert head == Head(family_of(arch).head, CLASSES, *DROPS.get(arch, ("", 0.0)))


class Twice(Tiny):
    """A network that calls its output layer twice."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        head = Linear(3, name="fc")
        return head(x.mean((1, 2))) + head(x.max((1, 2)))


class Convolved(Tiny):
    """A network whose output layer is a convolution."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return Conv(3, 1, name="fc")(x).mean((1, 2))


def test_a_network_without_features_is_refused() -> None:
    for model, said in ((Twice(), "Twice calls its output layer fc 2 times: it has no features to keep; set"),
                        (Convolved(), "the output layer fc is a Conv, no linear layer; set --noconfig")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            head_of(model, "fc", variable_shapes(model, 6), 6)


def probe_config(**settings: Any) -> Any:
    config = config_module.default()
    config.train.method = "probe"  # of a network whose head is called as a ResNet's
    config.optim.update({"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "clip_norm": 0.5})
    for key, value in settings.items():
        config_module.put(config, key.replace("__", "."), value)
    return config


def updates(step: Any, optimizer: Any, batches: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    state, found = TrainState.create(jax.tree.map(jnp.asarray, tiny.variables()), optimizer, with_average=False), []
    step = compiled(step)
    for batch in batches:
        state, counts = step(state, {}, batch)
        found.append((state, counts))
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
def test_kept_features_train_as_the_network_does(accumulate: int) -> None:
    """Five updates with momentum, coupled decay and clipping; what is frozen stays bit for bit."""
    with jax.enable_x64(True):
        config = probe_config()
        model = Tiny(frozen=frozen_patterns(config))
        optimizer = make_optimizer(config, tiny.variables()["params"], make_schedule(config, 1, 5))
        head = head_of(model, "fc", tiny.variables(), tiny.SIDE)
        assert head == Head("fc", tiny.CLASSES, "dropout", 0.0, jnp.float64)
        make = compiled(make_features_step(model, "fc", None))
        example, shown, kept = np.arange(16, dtype=np.int32), [], []
        for number in range(5):
            images, labels = tiny.batch(number)
            shown.append({"example": example, "label": labels, "image": images})
            features = make(tiny.variables(), {}, {**shown[-1], "mask": np.ones(16, bool)})["features"]
            kept.append({"example": example, "label": labels, "image": features})
        whole = updates(
            make_train_step(Objective(model, Inputs(None)), optimizer, accumulate=accumulate), optimizer, shown
        )
        alone = updates(
            make_train_step(Objective(head, Inputs(None)), optimizer, accumulate=accumulate), optimizer, kept
        )
        for (one, counts), (other, expected) in zip(alone, whole, strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), (one, counts), (other, expected))
        before, after = tiny.variables(), alone[-1][0].variables()
        assert np.abs(after["params"]["fc"]["kernel"] - before["params"]["fc"]["kernel"]).max() > 0.01
        for name in ("conv1", "bn1"):
            jax.tree.map(np.testing.assert_array_equal, after["params"][name], before["params"][name])
        jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], before["batch_stats"])


def test_the_dropout_before_the_head_draws_as_in_the_network() -> None:
    with jax.enable_x64(True):
        model, values = Tiny(dropout=0.5, frozen=("",)), tiny.variables()
        keys = jax.vmap(jax.random.key)(jnp.arange(16))
        images, _ = tiny.batch(0)
        head = head_of(model, "fc", values, tiny.SIDE)
        assert (head.dropout, head.rate) == ("dropout", 0.5)
        # of the body the network drops whole images too, which a frozen body's features have not
        monkey = pytest.MonkeyPatch()
        monkey.setattr(tiny, "StochasticDepth", lambda rate, name: lambda x, keys: x)
        with monkey.context():
            expected = model.apply(values, images, train=True, keys=keys, mutable=["batch_stats"])[0]
            features = entering(model, "fc", values, images).features
        monkey.undo()
        found = head.apply(values, features, train=True, keys=keys)
        np.testing.assert_allclose(found, expected, **ROUNDING)
        assert np.abs(found - head.apply(values, features, train=False)).max() > 0.1


def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident_mb: int, bad: tuple[int, ...] = ()) -> Keeper:
    """Of features that are the mean colour of an image, of which some can't be read."""
    config = probe_config(data__resident_mb=resident_mb, data__batch_size=4)
    monkeypatch.setenv("JAXSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "PIXELS", 8 * 32 * 32)

    def step(variables: Any, dataset: Any, batch: Any) -> dict[str, Any]:
        readable = batch["mask"] & ~jnp.isin(batch["example"], jnp.array(bad, int))
        return {"features": batch["image"].astype(jnp.float32).mean((1, 2)), "mask": readable}

    monkeypatch.setattr(features, "make_features_step", lambda *_, **__: step)
    one_device = DataParallel("shard_map", jax.devices()[:1])
    return Keeper(config, Tiny(), "fc", {}, Preprocessing(32, 32), one_device, BadFiles("skip"))


IMAGES = np.random.default_rng(3).integers(0, 256, (21, 32, 32, 3), np.uint8)
SOURCE = Arrays(IMAGES, np.arange(21, dtype=np.int32) % 3, ("a", "b", "c"))
MEANS = IMAGES.astype(np.float32).mean((1, 2))


@pytest.mark.parametrize("resident_mb", [1, 0])
def test_features_are_kept_on_the_device_or_in_a_file(tmp_path: Path, monkeypatch, resident_mb: int) -> None:
    kept = (made := keeper(tmp_path, monkeypatch, resident_mb)).kept(SOURCE, "training")
    assert made.batch_size == 8
    assert isinstance(kept.images, np.memmap) == (resident_mb == 0)
    np.testing.assert_allclose(kept.images, MEANS, rtol=1e-5)
    np.testing.assert_array_equal(kept.labels, SOURCE.labels)
    loader = made.loader(kept, [{"example": np.array([20, 3, 3, 7], np.int32)}])
    assert bool(loader.dataset) == (resident_mb > 0)
    batch = loader.batch(0)
    found = loader.dataset["images"][batch["example"]] if resident_mb else batch["image"]
    np.testing.assert_allclose(found, MEANS[[20, 3, 3, 7]], rtol=1e-5)
    assert not list((tmp_path / "cache").glob("*") if resident_mb == 0 else [])  # a file without a name


def test_images_that_cant_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training the next one that can, the first after the last; in evaluation none."""
    made = keeper(tmp_path, monkeypatch, 1, bad=(0, 4, 5, 20))
    training, evaluated = made.kept(SOURCE, "training", substitute=True), made.kept(SOURCE, "evaluation")
    rows = [1, 1, 2, 3, 6, 6, *range(6, 20), 1]
    np.testing.assert_allclose(training.images, MEANS[rows], rtol=1e-5)
    np.testing.assert_array_equal(training.labels, SOURCE.labels[rows])
    np.testing.assert_allclose(evaluated.images, np.delete(MEANS, [0, 4, 5, 20], 0), rtol=1e-5)
    with pytest.raises(Stop, match="none of the 21 images for training can be read"):
        keeper(tmp_path, monkeypatch, 1, bad=tuple(range(21))).kept(SOURCE, "training")


def test_a_disk_without_room_for_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    made = keeper(tmp_path, monkeypatch, 0)
    monkeypatch.setattr(features.os, "posix_fallocate", full)
    with pytest.raises(Stop, match="0 MB of features can't be kept in .*: No space left on device; make room there"):
        made.kept(SOURCE, "training")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A port of the small network, of ten classes that are not the sample's."""
    path = tmp_path_factory.mktemp("port") / "port"
    model = ARCHITECTURES[small.ARCH](num_classes=10)
    save(path, init_variables(model, 3, 32), ModelCard(small.ARCH, 10, tuple("abcdefghij")))
    return path


def options(weights: Path, method: str, *more: str) -> tuple[str, ...]:
    return (f"--config.model.weights={weights}", f"--config.train.method={method}", "--config.optim.lr=0.5", *more)


@pytest.fixture(scope="module")
def probed(weights: Path, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("probed") / "run"
    small.run_here(workdir, *options(weights, "probe"))
    return workdir


def test_a_probe_moves_the_head_alone(probed: Path, weights: Path) -> None:
    run = load_run(probed)
    start = load_run_variables(weights)
    for name, value in checkpoint.named(run.variables).items():
        if not name.startswith("params/fc"):
            np.testing.assert_array_equal(value, start[name], err_msg=name)
    found, last = evaluate_run(run, open_examples(run)), small.outcome(probed)[1][-1]
    assert (found.accuracy, found.count) == (last["accuracy"], last["count"])
    assert found.loss == pytest.approx(last["loss"], rel=1e-5)  # float32, in batches of another size


def load_run_variables(port: Path) -> dict[str, Any]:
    from jaxsft.models import weights as module

    return checkpoint.named(module.load(port)[0])


def cut(whole: Path, place: Path) -> Path:
    """A copy as of a run that was killed after an earlier checkpoint: what came later is taken away."""
    path = shutil.copytree(whole, place)
    first, *later = checkpoint.steps(path)
    for step in later:
        shutil.rmtree(path / "checkpoints" / str(step))
    log = path / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= first))
    return path


def test_a_probe_that_was_killed_ends_bit_equal(probed: Path, weights: Path, tmp_path: Path) -> None:
    path = cut(probed, tmp_path / "cut")
    small.run_here(path, *options(weights, "probe"))
    assert small.outcome(path) == small.outcome(probed)


def test_features_in_a_file_train_the_same(probed: Path, weights: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Keeper, "most_bytes", 0)
    small.run_here(tmp_path / "run", *options(weights, "probe"))
    one, other = (load_run(path).variables["params"]["fc"] for path in (probed, tmp_path / "run"))
    # another program gathers; XLA may order sums anew
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


def test_fine_tuning_starts_from_the_head_of_a_probe(weights: Path, tmp_path: Path, capsys) -> None:
    """That of a run of a probe at its rate; and from the body of the weights, with no momentum yet."""
    alone = ("--config.train.epochs=2", "--config.optim.lr=0.3", "--config.optim.warmup_epochs=0",
             "--config.optim.weight_decay=0", "--noconfig.optim.nesterov")  # fmt: skip
    small.run_here(tmp_path / "probe", f"--config.model.weights={weights}", "--config.train.method=probe", *alone)
    settings = (
        *("--config.train.probe_epochs=2", "--config.train.probe_lr=0.3", "--config.optim.name=adamw"),
        *("--config.optim.lr_multipliers=(('conv', 0.5),)", "--config.train.mixup=0.2", "--config.train.ema=0.9"),
    )
    made, said = prepare.prepare(small.config(*options(weights, "lp-ft", *settings)))
    assert said.endswith("; a probe of 2 epochs first")
    before = checkpoint.named(jax.device_get(made.state.params))
    made.begin(made, 3)
    np.testing.assert_array_equal(
        made.state.params["fc"]["kernel"], before["fc/kernel"]
    )  # resumed: its checkpoint has it
    capsys.readouterr()
    made.begin(made, 0)
    assert re.fullmatch(r"probe: accuracy 0\.\d+ \(\d+ of 64\).* on the features of the training images, .* s\n",
                        capsys.readouterr().out)  # fmt: skip
    after, expected = jax.device_get(made.state), load_run(tmp_path / "probe").variables["params"]["fc"]
    # the same updates, of a tree of other leaves
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.params["fc"], expected)
    assert np.abs(after.params["fc"]["kernel"] - before["fc/kernel"]).max() > 1e-3
    for name, value in checkpoint.named(after.params).items():
        if not name.startswith("fc/"):
            np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert int(after.step) == 0
    jax.tree.map(np.testing.assert_array_equal, after.average, after.variables())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.opt_state))
