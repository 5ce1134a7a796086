"""Every key of the config has a test of what it computes, here or elsewhere: not only that it is accepted."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F  # noqa: N812  (as torchvision's users write it)
from torchvision.transforms import v2

from jaxsft import config as config_module
from jaxsft.data import color, policy
from jaxsft.data.augment import Amounts, preprocess, train_images
from jaxsft.data.base import Options
from jaxsft.data.sources import open_splits
from jaxsft.interpret import metrics
from jaxsft.models import families, initial, layers, resnet
from jaxsft.models.family import variable_shapes
from jaxsft.models.resnet import BasicBlock, ResNet
from jaxsft.models.weights import Preprocessing
from jaxsft.run import checkpoint, job, log, prepare, training
from jaxsft.run.pretrained import load_pretrained
from jaxsft.run.working_copy import WorkingCopy
from tests import small
from tests.tiny import compiled

# key -> the test of what it computes, by its name
TESTS = {
    "seed": "test_pictures_are_drawn_by_seed_step_and_example",
    "model.arch": "test_a_deep_network_on_images_of_an_odd_size",
    "model.weights": "test_ports_are_kept_and_directories_used_as_they_are",
    "model.checkpoint": "test_a_run_is_gone_on_from",
    "model.num_classes": "test_the_model_is_the_configs",
    "model.classes": "test_kept_rows_are_bit_equal_and_new_ones_as_of_a_fresh_head",
    "model.head": "test_a_head_is_kept_where_its_classes_are_the_datas",
    "model.head_init": "test_the_model_is_the_configs",
    "model.freeze": "test_first_step",
    "model.unfreeze": "test_unfreezing_is_torchs",
    "model.dropout": "test_rates_are_torchvisions_or_the_configs",
    "model.stochastic_depth": "test_rates_are_torchvisions_or_the_configs",
    "model.batch_norm": "test_the_model_is_the_configs",
    "data.source": "test_files_classes_and_order_are_those_of_image_folder",
    "data.data_dir": "test_tfds_and_folder_hold_the_same_images",
    "data.train_split": "test_slices",
    "data.eval_split": "test_slices",
    "data.eval_fraction": "test_one_tree_is_divided_by_class",
    "data.fraction": "test_of_each_class_is_trained_on_what_the_config_says",
    "data.per_class": "test_of_each_class_is_trained_on_what_the_config_says",
    "data.class_order": "test_the_order_of_classes",
    "data.label_delimiter": "test_tables_of_several_labels_an_image",
    "data.on_error": "test_a_broken_image_is_left_out_and_listed",
    "data.exif_orientation": "test_pictures_are_turned_as_they_say",
    "data.check_overlap": "test_a_registered_source",
    "data.cache": "test_the_second_pass_is_read_from_the_cache",
    "data.resident_mb": "test_what_fits_is_held_in_memory",
    "data.workers": "test_worker_processes_change_nothing",
    "data.unlabelled": "test_the_gradient_of_fixmatch_is_torchs",
    "data.unlabelled_split": "test_unlabelled_images_come_in_an_order_of_their_own",
    "data.unlabelled_ratio": "test_unlabelled_images_come_in_an_order_of_their_own",
    "data.image_size": "test_preprocessing_is_torchvisions",
    "data.resize_size": "test_preprocessing_is_torchvisions",
    "data.interpolation": "test_preprocessing_is_torchvisions",
    "data.batch_size": "test_a_run_is_as_long_and_as_wide_as_its_config",
    "data.last_batch": "test_a_run_is_as_long_and_as_wide_as_its_config",
    "data.sampling": "test_a_run_is_as_long_and_as_wide_as_its_config",
    "data.augment": "test_pictures_are_drawn_by_seed_step_and_example",
    "data.crop_scale": "test_amounts_of_augmentations",
    "data.crop_ratio": "test_amounts_of_augmentations",
    "data.jitter": "test_amounts_of_augmentations",
    "data.rand_augment": "test_amounts_of_augmentations",
    "data.erasing": "test_amounts_of_augmentations",
    "data.preset": "test_preprocessing_is_torchvisions",
    "data.mean": "test_preprocessing_is_torchvisions",
    "data.std": "test_preprocessing_is_torchvisions",
    "optim.name": "test_updates_are_torchs",
    "optim.lr": "test_updates_are_torchs",
    "optim.lr_scaling": "test_the_rate_grows_with_the_batch",
    "optim.momentum": "test_updates_are_torchs",
    "optim.nesterov": "test_updates_are_torchs",
    "optim.betas": "test_updates_are_the_published_ones",
    "optim.eps": "test_updates_are_the_published_ones",
    "optim.trust_coefficient": "test_updates_are_the_published_ones",
    "optim.weight_decay": "test_updates_are_torchs",
    "optim.decay_norm_and_bias": "test_updates_are_torchs",
    "optim.no_decay": "test_decay_by_kind_is_torchvisions",
    "optim.l2_sp": "test_decay_towards_the_start_is_a_term_of_the_loss",
    "optim.schedule": "test_schedules_are_torchs",
    "optim.schedule_by": "test_rates_are_torchs",
    "optim.warmup_epochs": "test_schedules_are_torchs",
    "optim.warmup_steps": "test_rates_are_torchs",
    "optim.step_epochs": "test_steps_fall_at_whole_epochs",
    "optim.step_factor": "test_steps_fall_at_whole_epochs",
    "optim.power": "test_rates_are_torchs",
    "optim.onecycle_warmup": "test_rates_are_torchs",
    "optim.layer_decay": "test_updates_are_torchs",
    "optim.lr_multipliers": "test_updates_are_torchs",
    "optim.sam": "test_the_two_gradients_of_sam_are_the_papers",
    "optim.clip_norm": "test_updates_are_torchs",
    "optim.accumulate": "test_gradient_accumulation_is_torchs",
    "train.method": "test_kept_features_train_as_the_network_does",
    "train.keep_features": "test_kept_features_train_as_the_network_does",
    "train.probe_epochs": "test_fine_tuning_starts_from_the_head_of_a_probe",
    "train.probe_lr": "test_fine_tuning_starts_from_the_head_of_a_probe",
    "train.epochs": "test_a_run_is_as_long_and_as_wide_as_its_config",
    "train.steps": "test_a_run_is_as_long_and_as_wide_as_its_config",
    "train.loss": "test_bce_is_torchs",
    "train.focal_gamma": "test_focal_is_torchvisions_or_its_formula",
    "train.label_smoothing": "test_gradient_accumulation_is_torchs",
    "train.class_weights": "test_gradient_accumulation_is_torchs",
    "train.mixup": "test_the_loss_of_mixed_images_is_torchs",
    "train.cutmix": "test_mixing_as_torchvision",
    "train.ema_warmup": "test_the_decay_of_a_moving_average_warms_up",
    "train.swa_epochs": "test_the_mean_over_epochs_is_torchs",
    "train.teacher": "test_teachers_are_known_by_their_classes",
    "train.distill_weight": "test_the_gradient_of_distillation_is_torchs",
    "train.temperature": "test_the_gradient_of_distillation_is_torchs",
    "train.fixmatch_threshold": "test_the_gradient_of_fixmatch_is_torchs",
    "train.fixmatch_weight": "test_the_gradient_of_fixmatch_is_torchs",
    "train.ema": "test_the_moving_average_is_torchvisions",
    "train.precision": "test_the_model_is_the_configs",
    "train.matmul_precision": "test_every_product_is_as_the_config_says",
    "train.remat": "test_remat_computes_the_same",
    "train.steps_per_call": "test_several_updates_a_call_are_bit_equal",
    "train.log_every_steps": "test_what_a_run_leaves_and_when",
    "train.on_changed_data": "test_who_means_it_goes_on_with_other_data",
    "train.on_nan": "test_a_loss_that_is_not_finite_is_ignored_where_asked",
    "eval.every_epochs": "test_what_a_run_leaves_and_when",
    "checkpoint.every_steps": "test_what_a_run_leaves_and_when",
    "checkpoint.keep": "test_what_a_run_leaves_and_when",
    "checkpoint.best_metric": "test_the_best_checkpoint_stays",
    "parallel.backend": "test_eight_devices",
    "parallel.batch_norm": "test_devices_are_the_whole_batch",
    "parallel.timeout_seconds": "test_a_process_that_does_not_come_is_named",
}


def test_every_key_has_a_test() -> None:
    keys = set(config_module.flatten(config_module.default().to_dict()))
    assert set(TESTS) == keys
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in TESTS.values() if not re.search(rf"^def {name}\(", text, re.MULTILINE)] == []


def config_of(**settings: Any):
    """The defaults on the embedded images, with a network that compiles soon; keys as section__name."""
    config = config_module.default()
    config.model.update({"arch": "small", "weights": ""})
    config.data.update({"source": "sample", "image_size": 32, "batch_size": 16, "augment": ()})
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """In the place of `conv2d`, which takes seconds to compile."""
    around, numbers = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), around, dimension_numbers=numbers)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of four channels, by the name of 'small'."""
    monkeypatch.setattr(layers, "conv2d", plain_conv)
    small = {"small": partial(ResNet, (1,), BasicBlock, width=4)}
    monkeypatch.setitem(families.ARCHITECTURES, "small", small["small"])
    monkeypatch.setattr(families, "FAMILIES", [dataclasses.replace(resnet.FAMILY, architectures=small)])


OF_WEIGHTS = Preprocessing(232, 224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
SMALL = {"data__image_size": 40, "data__mean": (0.3, 0.4, 0.5), "data__std": (0.1, 0.2, 0.3)}


@pytest.mark.parametrize(
    ("settings", "resize", "mode"),
    [
        (SMALL, 40, F.InterpolationMode.BILINEAR),
        ({**SMALL, "data__interpolation": "bicubic"}, 40, F.InterpolationMode.BICUBIC),
        ({**SMALL, "data__resize_size": 48}, 48, F.InterpolationMode.BILINEAR),
        ({**SMALL, "data__preset": "weights"}, 41, F.InterpolationMode.BICUBIC),
    ],
)
def test_preprocessing_is_torchvisions(settings: dict[str, Any], resize: int, mode: F.InterpolationMode) -> None:
    """Resize(resize), CenterCrop(image_size) and Normalize(mean, std), those of the weights where these are asked."""
    preset = "data__preset" in settings
    mean, std = (OF_WEIGHTS.mean, OF_WEIGHTS.std) if preset else (SMALL["data__mean"], SMALL["data__std"])
    pictures = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), np.uint8)
    steps = (
        v2.Resize(resize, mode, antialias=True), v2.Lambda(lambda x: x.clip(0, 255)), v2.CenterCrop(40),
        v2.ToDtype(torch.float32, scale=False), v2.Normalize([255 * m for m in mean], [255 * s for s in std]),
    )  # fmt: skip
    expected = v2.Compose(steps)(torch.from_numpy(pictures.transpose(0, 3, 1, 2)).float()).numpy()
    found = preprocess(pictures.astype(np.float32), initial.preprocessing(config_of(**settings), OF_WEIGHTS))
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1e-4)  # float32 on 0..255 over 0.1


def one_picture(names: tuple[str, ...], **settings: Any) -> np.ndarray:
    """Sixteen draws of one augmentation of one picture, 0..1."""
    plain = Preprocessing(32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    amounts = Amounts.of(config_of(**settings))
    body = partial(train_images, names=names, to=plain, amounts=amounts)
    pictures = np.broadcast_to(PICTURE, (16, *PICTURE.shape))
    return np.asarray(compiled(lambda key: body(pictures, key=key, examples=np.arange(16)))(jax.random.key(0)))


PICTURE = np.random.default_rng(0).integers(60, 160, (32, 32, 3), np.uint8)


def test_amounts_of_augmentations(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.from_numpy(PICTURE.transpose(2, 0, 1)).float() / 255
    # Half the area, twice as wide as high: whole rows.
    wide = one_picture(("random_resized_crop",), data__crop_scale=(0.5, 0.5), data__crop_ratio=(2.0, 2.0))
    strips = np.stack([F.resized_crop(tensor, i, 0, 16, 32, [32, 32], antialias=True).numpy() for i in range(17)])
    assert np.abs(strips.transpose(0, 2, 3, 1)[None] - wide[:, None]).max((2, 3, 4)).min(1).max() < 1e-4

    plain = PICTURE / np.float32(255)
    for share in (0.0, 1.0):
        found = one_picture(("random_erasing",), data__erasing=share)
        untouched = np.abs(found - plain).max((1, 2, 3)) < 1e-6
        assert not untouched.any() if share else untouched.all()

    # Which change, and by how much, shows in the picture; what each does has tests of its own, as have the policies.
    changes = ("brightness", "contrast", "saturation", "hue")
    for place, name in enumerate(changes):
        monkeypatch.setattr(color, name, lambda image, amount, place=place: 0 * image + 10 * (place + 1) + amount)
    for place in range(4):
        jitter = tuple(0.4 * (i == place) for i in range(4))
        amounts = 255 * one_picture(("color_jitter",), data__jitter=jitter)[:, 0, 0, 0] - 10 * (place + 1)
        low, high = (0.6, 1.4) if place < 3 else (-0.4, 0.4)
        assert low - 1e-4 <= amounts.min() < low + 0.25 < high - 0.25 < amounts.max() <= high + 1e-4

    monkeypatch.setattr(policy, "rand_augment", lambda key, image, count, magnitude: 0 * image + 10 * count + magnitude)
    np.testing.assert_allclose(one_picture(("rand_augment",), data__rand_augment=(3, 11)), 41 / 255, rtol=1e-6)


def test_sources_are_opened_as_the_config_says() -> None:
    config = config_of(data__data_dir="/x", data__eval_fraction=0.3, data__on_error="skip", data__resident_mb=7)
    config.data.exif_orientation, config.data.class_order, config.seed = False, "numeric", 5
    assert Options.of(config) == Options("/x", 0.3, 5, "skip", False, 7, "numeric")


def zeros(model: nn.Module, seed: int, image_size: int) -> dict[str, Any]:
    """In the place of fresh variables, where they do not matter."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variable_shapes(model))


def test_the_model_is_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.ones((2, 32, 32, 3))
    for precision in ("float32", "bfloat16"):
        model = initial.make_model(config_of(train__precision=precision), 7)
        shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes["params"])} == {jnp.dtype("float32")}
        run = partial(model.apply, train=True, capture_intermediates=True, mutable=["batch_stats", "intermediates"])
        logits, seen = jax.eval_shape(run, shapes, x)
        assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
        body = {k: v for k, v in seen["intermediates"].items() if k not in ("fc", "__call__")}
        assert {leaf.dtype for leaf in jax.tree.leaves(body)} == {jnp.dtype(precision)}
    assert initial.make_model(config_of(model__batch_norm="frozen"), 7).frozen == ("",)
    assert initial.make_model(config_of(model__freeze=("^conv1",)), 7).frozen == ("^conv1",)
    monkeypatch.setattr(initial, "init_variables", zeros)
    for num_classes, width in ((None, 4), (9, 9)):
        _, values, card, *_ = initial.initial(config_of(model__num_classes=num_classes), tuple("abcd"), load_pretrained)
        assert values["params"]["fc"]["kernel"].shape[1] == card.num_classes == width
    for head_init, bound in (("zeros", 0.0), ("torch", 16**-0.5)):
        model = initial.make_model(config_of(model__head_init=head_init), 50)
        head = initial.init_head(model, {"kernel": np.zeros((16, 3), np.float32)}, 0)
        for leaf in jax.tree.leaves(head):
            assert 0.9 * bound <= np.abs(leaf).max() <= bound


def test_remat_computes_the_same() -> None:
    """The gradient, with a backward pass that computes each block anew."""
    x, found = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32), []
    for remat in (False, True):
        model: nn.Module = initial.make_model(config_of(train__remat=remat), 5)
        rng = np.random.default_rng(1)
        values = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype), variable_shapes(model))

        def loss(params: Any, model: nn.Module = model, stats: Any = values["batch_stats"]) -> jax.Array:
            variables = {"params": params, "batch_stats": stats}
            return (model.apply(variables, x, train=True, mutable=["batch_stats"])[0] ** 2).sum()

        assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(values["params"]))) == remat
        found.append(compiled(jax.grad(loss))(values["params"]))
    # float32 sums in another program
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()), *found)


# settings -> updates of the run, of an epoch, of 100 images
LENGTHS: tuple[tuple[dict[str, Any], int, int], ...] = (
    ({"train__epochs": 2.5}, 15, 6),
    ({"train__steps": 4}, 4, 6),
    ({"data__batch_size": 30, "train__epochs": 1.0}, 3, 3),
    ({"data__batch_size": 30, "data__last_batch": "keep", "train__epochs": 1.0}, 4, 4),
)


@pytest.fixture
def _ten_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepare.open_splits

    def open_few(config: Any) -> Any:
        train_source, evaluated = real(config)
        few = [np.flatnonzero(train_source.labels == label)[:10] for label in range(10)]
        keep = np.sort(np.concatenate(few))
        return train_source.select(keep), evaluated.select(np.arange(20))

    monkeypatch.setattr(prepare, "open_splits", open_few)


@pytest.mark.usefixtures("_ten_a_class")
def test_a_run_is_as_long_and_as_wide_as_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "init_variables", zeros)
    for settings, total, of_an_epoch in LENGTHS:
        config = config_of(**settings)
        made, _ = prepare.prepare(config)
        assert (made.total_steps, made.order.steps_per_epoch) == (total, of_an_epoch), settings
        assert len(made.rates) == total
        assert len(made.order[0]) == config.data.batch_size
        assert len(made.order[of_an_epoch - 1]) == (10 if config.data.last_batch == "keep" else config.data.batch_size)
    source = made.train_source.select(np.r_[:60, 90:100])  # classes of unequal size
    order = prepare.order_of(config_of(data__sampling="balanced", data__batch_size=70), source, made.parallel)
    counts = np.bincount(source.labels[order[0]], minlength=10)
    assert len(np.unique(source.labels)) * [len(order[0]) // len(np.unique(source.labels))] == list(counts[counts > 0])


@pytest.mark.parametrize(("settings", "share"), [({"data__fraction": 0.3}, 0.3), ({"data__per_class": 7}, None)])
def test_of_each_class_is_trained_on_what_the_config_says(settings: dict[str, Any], share: float | None) -> None:
    counts = [np.bincount(open_splits(config)[0].labels) for config in (config_of(), config_of(**settings))]
    np.testing.assert_array_equal(counts[1], 7 if share is None else np.round(share * counts[0]))


@pytest.mark.usefixtures("_ten_a_class")
def test_what_a_run_leaves_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six updates an epoch, fourteen in all: lines, evaluations and checkpoints where the config puts them.

    The updates and evaluations themselves compute nothing here.
    """
    monkeypatch.setattr(initial, "init_variables", zeros)
    config = config_of(
        train__steps=14, train__log_every_steps=4, eval__every_epochs=0.75, checkpoint__every_steps=5,
        checkpoint__keep=2, optim__lr=0.1,
    )  # fmt: skip
    made, _ = prepare.prepare(config)
    nothing = metrics.count(jnp.zeros((16, 10)), jnp.zeros(16, int), jnp.ones(16), jnp.ones(16, bool))
    made.train_step = jax.jit(lambda state, *_: (state.replace(step=state.step + 1), {k: nothing[k] for k in log.ZERO}))
    made.eval_step, made.compile_ahead = small.knows_nothing, lambda start: None
    training.fit(made, WorkingCopy(tmp_path))
    steps = {split: [r["step"] for r in log.records(tmp_path) if r["split"] == split] for split in ("train", "eval")}
    assert steps == {"train": [4, 8, 12, 14], "eval": [5, 9, 14]}  # the first at or after each 4.5
    assert checkpoint.steps(tmp_path) == [10, 14]  # of 5, 10 and 14
    found = [record["lr"] for record in log.records(tmp_path) if record["split"] == "train"]
    np.testing.assert_allclose(found, [0.05 * (1 + np.cos(np.pi * (t - 1) / 14)) for t in (4, 8, 12, 14)], rtol=1e-4)


@pytest.mark.parametrize(("every", "steps_per_epoch", "at"), [(0.1, 11, 11), (0.3, 10, 9), (1.0, 7, 14), (2.5, 4, 10)])
def test_an_evaluation_falls_on_the_step_that_is_written(every: float, steps_per_epoch: int, at: int) -> None:
    order = SimpleNamespace(steps_per_epoch=steps_per_epoch)
    run = SimpleNamespace(config=config_of(eval__every_epochs=every), order=order, total_steps=1000)
    assert job.Job.is_evaluated(run, at)
