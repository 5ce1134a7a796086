"""What a config makes of a step, and that its numbers are arguments: another rate, seed or length, the same program."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxsft.data.augment import Amounts
from jaxsft.data.mix import mix
from jaxsft.learn import losses as losses_module
from jaxsft.learn import steps
from jaxsft.learn.average import swa_start
from jaxsft.learn.distill import Teacher
from jaxsft.learn.fixmatch import FixMatch
from jaxsft.learn.objective import Inputs, Objective
from jaxsft.models.weights import Preprocessing
from jaxsft.run import program as program_module
from jaxsft.run.numbers import NUMBERS, RATE, UPDATES, Number, numbers_of
from jaxsft.run.prepare import prepare
from jaxsft.run.program import Program
from jaxsft.run.shared import Shared, program_key
from jaxsft.tune import pool
from tests import small

OF_WEIGHTS = Preprocessing(232, 224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
QUICK = ("--config.train.epochs=2", "--config.eval.every_epochs=1", "--config.optim.warmup_epochs=0")
# Each at two values; those of mixing have a test of their own, for they compile for long.
ON = {"optim.weight_decay": 0.01, "optim.clip_norm": 1.0, "train.label_smoothing": 0.1, "train.ema": 0.9,
      "optim.sam": 0.05, "optim.layer_decay": 0.5}  # fmt: skip
OTHERS = {"optim.weight_decay": 0.1, "optim.clip_norm": 0.5, "train.label_smoothing": 0.2, "train.ema": 0.5,
          "optim.sam": 0.1, "optim.layer_decay": 0.7, "optim.momentum": 0.5, "optim.lr": 0.2,
          "optim.schedule": "linear", "train.epochs": 3.0, "seed": 4}  # fmt: skip


def config_with(changes: dict[str, Any]) -> ConfigDict:
    return small.config(*QUICK, *(f"--config.{key}={value}" for key, value in changes.items()))


def parts(config: ConfigDict) -> pool.Pool:
    return pool.open_pool(config, 3)


def with_constants(program: Program, make: Any) -> Any:
    """In the place of `taking_numbers`: a step with its numbers compiled into it."""
    ends = swa_start(program.total, program.every, program.config.train.swa_epochs), program.every
    step = make(program, ends)
    return lambda state, dataset, batch: step(state, {k: v for k, v in dataset.items() if k != "numbers"}, batch)


def losses(config: ConfigDict, splits: pool.Splits, shared: Shared | None) -> list[float]:
    """The loss of every batch, and that of the evaluation at the end."""
    job, _ = prepare(config, splits, shared)
    found = [float(jax.device_get(job.update(call)["loss"])) for call in job.calls(0)]
    return [*found, job.evaluate().loss]


def test_the_step_is_told_what_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of it has tests of its own."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(program_module, "make_train_step", lambda _, __, **options: told.update(options))
    monkeypatch.setattr(losses_module, "make_loss", lambda *arguments: arguments)
    config = small.config()
    config.update_from_flattened_dict({
        "optim.accumulate": 4, "train.loss": "focal", "train.focal_gamma": 3.0, "train.label_smoothing": 0.1,
        "train.class_weights": (1.0, 2.0), "train.mixup": 0.2, "train.cutmix": 0.3, "data.augment": ("flip",),
        "data.erasing": 0.7, "data.unlabelled": "sample", "optim.sam": 0.05, "train.fixmatch_threshold": 0.8,
        "train.fixmatch_weight": 2.0, "seed": 5,
    })  # fmt: skip
    config.model.freeze = ("^a",)
    params = {"a": np.zeros(1), "fc": {"kernel": np.zeros((1, 1))}}
    parallel = SimpleNamespace(axis_name="batch")
    own = program_module.Program(config, None, params, lambda step: 0.1, 10, 100, parallel)
    own.update(0, (0, 0))
    assert told == {
        "seed": 5, "accumulate": 4, "sam": 0.05, "frozen": ("a",), "average": None, "axis_name": "batch",
    }  # fmt: skip
    assert losses_module.loss_of(config, "batch") == (0.1, (1.0, 2.0), "batch", "focal", 3.0)
    found = Objective.of(config, None, OF_WEIGHTS, losses_module.cross_entropy, None, Preprocessing())
    inputs = Inputs(OF_WEIGHTS, ("flip",), Amounts(erasing=0.7))
    told_of = inputs, losses_module.cross_entropy, 0.2, 0.3, None, FixMatch(0.8, 2.0)
    assert found == Objective(None, *told_of, dataclasses.replace(inputs, preprocessing=Preprocessing()))
    config.train.update({"distill_weight": 0.3, "temperature": 5.0})
    teacher = dataclasses.replace(own, teacher=Teacher(None, OF_WEIGHTS, (1, 0))).objective().teacher
    assert teacher == Teacher(None, OF_WEIGHTS, (1, 0), 0.3, 5.0)


def test_numbers_as_arguments_compute_what_constants_do_and_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)  # called while a step is traced, before it is compiled
        monkeypatch.setattr(module, name, lambda *what, **how: (traced.append(name), original(*what, **how))[1])

    watch(program_module, "make_train_step")
    watch(steps, "preprocess")
    config, other = config_with(ON), config_with({**ON, **OTHERS})
    data, shared = parts(config), Shared()
    first = losses(config, data.splits(0), shared)
    assert traced == ["make_train_step", "preprocess"]
    second = losses(other, data.splits(1), shared)  # of 43 images after 42, 6 updates after 4
    assert traced == ["make_train_step", "preprocess"]
    # float32, whose sums XLA may order otherwise where a factor is a constant; the losses are sums of 16.
    monkeypatch.setattr(Program, "taking_numbers", with_constants)
    assert np.allclose(second, losses(other, data.splits(1), None), rtol=1e-5)
    assert not np.allclose(first[:4], second[:4], rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        "optim.name=adamw optim.lr_scaling=linear optim.schedule=onecycle optim.betas=0.8,0.99 optim.eps=1e-6",
        "optim.name=lamb optim.schedule=polynomial optim.sam=0.1",
        "optim.name=lars train.loss=bce optim.no_decay=norm optim.trust_coefficient=0.01",
        "optim.name=lion optim.betas=0.8,0.99 optim.accumulate=2",
        "optim.name=muon model.freeze=layer1 optim.l2_sp=0",
        "train.ema_warmup=True train.class_weights=1,2,1,1,1,1,1,1,1,1",
        "train.loss=focal train.focal_gamma=1.5 train.label_smoothing=0",
        "data.unlabelled=sample data.unlabelled_ratio=1 train.mixup=0 train.cutmix=0 optim.sam=0",
    ],
)
def test_every_kind_of_update_takes_its_numbers_as_arguments(options: str) -> None:
    mixing = ("train.mixup=0.2", "train.cutmix=0.2", "optim.nesterov=False")
    changes = [*(f"{key}={value}" for key, value in ON.items()), *mixing, *options.split()]
    config = small.config(*QUICK, *(f"--config.{change}" for change in changes))
    job, _ = prepare(config, parts(config).splits(0), Shared())
    text = job.train_step.lower(job.state, job.train_loader.dataset, job.train_loader.batch(0)).as_text()
    assert f"tensor<{UPDATES}xf32>" in text  # the rates are there, and nothing has taken a number for a constant


def test_mixing_takes_its_numbers_as_arguments() -> None:
    images = jax.random.normal(jax.random.key(0), (2, 4, 6, 6, 3))

    @jax.jit
    def ours(key: jax.Array, mixup: jax.Array, cutmix: jax.Array) -> Any:
        return mix(key, *images, Number(mixup), Number(cutmix))  # type: ignore[arg-type]

    constant = jax.jit(lambda key: mix(key, *images, 0.3, 0.7))
    for seed in range(4):  # on both sides of the coin
        key = jax.random.key(seed)
        for mine, theirs in zip(ours(key, 0.3, 0.7), constant(key), strict=True):
            assert np.allclose(mine, theirs, rtol=1e-5, atol=1e-6)  # float32
    assert ours._cache_size() == 1


def test_programs_are_told_apart_by_all_but_numbers() -> None:
    key = program_key(small.config())
    assert key == program_key(
        small.config(
            "--config.optim.lr=1", "--config.optim.momentum=0.1", "--config.eval.every_epochs=9", "--config.seed=1"
        )
    )
    for change in (
        "--config.optim.momentum=0",
        "--config.optim.nesterov=False",
        "--config.data.batch_size=8",
        "--config.optim.layer_decay=0.5",
    ):
        assert key != program_key(small.config(change)), change
    assert set(RATE) & set(NUMBERS) == set()
    for updates in (1, UPDATES, UPDATES + 1):
        rates = numbers_of(small.config(), np.ones(updates, np.float32), 4)["rates"]
        assert (len(rates), rates.sum()) == (UPDATES if updates <= UPDATES else 2 * UPDATES, updates)


def test_another_start_runs_the_program_that_is_compiled() -> None:
    """A changed rate, schedule, length of the run, seed or number leaves the text of each step as it is."""
    both = {"train.swa_epochs": 1, "train.loss": "focal", "data.augment": "flip"}
    one = {**both, "train.focal_gamma": 2.0, "optim.lr": 0.1, "seed": 1, "train.epochs": 2.0}
    other = {**both, "train.focal_gamma": 1.0, "optim.lr": 0.2, "seed": 2, "train.epochs": 4.0,
             "optim.schedule": "step", "optim.step_epochs": 1, "optim.warmup_epochs": 1.0,
             "optim.momentum": 0.5}  # fmt: skip
    texts = []
    for changes in (one, other):
        job, _ = prepare(config_with(changes))
        dataset, batch = job.train_loader.dataset, job.train_loader.batch(0)
        assert job.statistics_step is not None
        average = {**job.state.average, "seen": np.int32(0)}
        lowered = (
            job.train_step.lower(job.state, dataset, batch),
            job.several_steps.lower(job.state, dataset, [batch, batch]),
            job.statistics_step.lower(average, dataset, batch),
        )
        texts.append([step.as_text() for step in lowered])
    assert texts[0] == texts[1]


def test_the_seed_is_an_argument_and_decides_what_is_drawn() -> None:
    """The key of the numbers is the seed's own."""
    keys = [numbers_of(config_with({"seed": seed}), np.ones(2, np.float32), 1)["key"] for seed in (3, 4, 2**40)]
    for seed, key in zip((3, 4, 2**40), keys, strict=True):
        assert np.array_equal(key, jax.random.key_data(jax.random.key(seed)))
    assert not np.array_equal(*keys[:2])


def test_distillation_and_fixmatch_take_their_numbers_as_arguments() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 8, 5)) * 3

    def both(weight: Any, temperature: Any, threshold: Any) -> Any:
        teacher = Teacher(None, Preprocessing(), (), weight, temperature)  # type: ignore[arg-type]
        return teacher.weight * teacher.loss(*logits), FixMatch(threshold, weight).loss(*logits)

    ours = jax.jit(lambda *numbers: both(*map(Number, numbers)))
    for numbers in ((0.3, 2.0, 0.5), (0.7, 4.0, 0.9)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours(*numbers), both(*numbers))
    assert ours._cache_size() == 1
