"""The rate of every update, against torch's schedulers step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.learn.schedule import make_schedule, peak_lr, scaling_said

schedulers = torch.optim.lr_scheduler


@pytest.mark.parametrize("per_epoch", [3, 41, 110, 391])
def test_steps_fall_at_whole_epochs(per_epoch: int) -> None:
    """torch's StepLR by updates, also where XLA's quotient of equal numbers is just below 1 (41, 110)."""
    config = config_module.default()
    config.optim.update({"schedule": "step", "lr": 1.0, "step_epochs": 2.0, "step_factor": 0.5})
    t = np.arange(9 * per_epoch, dtype=np.int32)
    parameter = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    scheduler, expected = torch.optim.lr_scheduler.StepLR(parameter, 2 * per_epoch, 0.5), []
    for _ in t:
        expected.append(parameter.param_groups[0]["lr"])
        parameter.step()
        scheduler.step()
    rate = make_schedule(config, per_epoch, len(t))
    for found in (rate(t), jax.jit(rate)(t)):
        np.testing.assert_array_equal(found, expected)


def rates(total: int = 100, **settings: object) -> np.ndarray:
    config = config_module.default()
    config.optim.lr = 1.0
    config.optim.update(settings)
    return np.asarray(make_schedule(config, steps_per_epoch=10, total_steps=total)(np.arange(total)))


def test_schedules() -> None:
    # float32 rates of up to 1: 1e-6 is ten roundings (absolute: near its end a falling rate is a difference).
    np.testing.assert_allclose(rates(schedule="constant"), np.ones(100), rtol=1e-6)
    np.testing.assert_allclose(rates(schedule="linear"), 1 - np.arange(100) / 100, atol=1e-6)
    np.testing.assert_allclose(rates(schedule="cosine"), 0.5 + 0.5 * np.cos(np.pi * np.arange(100) / 100), atol=1e-6)
    stepped = 0.1 ** (np.arange(100) // 30)
    np.testing.assert_allclose(rates(schedule="step", step_epochs=3.0), stepped, rtol=1e-6)
    warm = rates(schedule="cosine", warmup_epochs=2.0)
    np.testing.assert_allclose(warm[:20], np.arange(1, 21) / 20, rtol=1e-6)
    np.testing.assert_allclose(warm[20:], 0.5 + 0.5 * np.cos(np.pi * np.arange(80) / 80), atol=1e-6)
    with pytest.raises(UserError, match="shorter than the run"):
        rates(total=10, warmup_epochs=1.0)


STEPS, PER_EPOCH = 24, 4


def stepped(make: Callable[[Any], Any], steps: int = STEPS) -> list[float]:
    """The rates of a scheduler of torch's, made of an optimizer at 0.3, stepped after every update."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def after_warmup(make: Callable[[Any], Any], warmup: int) -> Callable[[Any], Any]:
    """A scheduler after a LinearLR that rises to the full rate."""

    def both(optimizer: Any) -> Any:
        rise = schedulers.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        return schedulers.SequentialLR(optimizer, [rise, make(optimizer)], [warmup])

    return both


def once_an_epoch(make: Callable[[Any], Any]) -> list[float]:
    return list(np.repeat(stepped(make, STEPS // PER_EPOCH), PER_EPOCH))


# settings of config.optim, torch's rate of every update
AGAINST_TORCH: dict[str, tuple[dict[str, Any], Callable[[], list[float]]]] = {
    "polynomial": (
        {"schedule": "polynomial", "power": 2.0},
        lambda: stepped(lambda o: schedulers.PolynomialLR(o, STEPS, 2.0)),
    ),
    "polynomial, warm": (
        {"schedule": "polynomial", "warmup_steps": 5, "warmup_epochs": 3.0},
        lambda: stepped(after_warmup(lambda o: schedulers.PolynomialLR(o, STEPS - 5, 1.0), 5)),
    ),
    "onecycle": ({"schedule": "onecycle"}, lambda: stepped(lambda o: one_cycle(o, STEPS, 0.3), STEPS)),
    "onecycle, soon": (
        {"schedule": "onecycle", "onecycle_warmup": 0.01},  # of 24 updates: the first is past the peak already
        lambda: stepped(lambda o: one_cycle(o, STEPS, 0.01), STEPS),
    ),
    "onecycle, late": (
        {"schedule": "onecycle", "onecycle_warmup": 0.95},
        lambda: stepped(lambda o: one_cycle(o, STEPS, 0.95), STEPS),
    ),
    "cosine by epoch": (
        {"schedule": "cosine", "schedule_by": "epoch"},
        lambda: once_an_epoch(lambda o: schedulers.CosineAnnealingLR(o, STEPS // PER_EPOCH)),
    ),
    "cosine by epoch, warm": (
        {"schedule": "cosine", "schedule_by": "epoch", "warmup_epochs": 2.0},
        lambda: once_an_epoch(after_warmup(lambda o: schedulers.CosineAnnealingLR(o, STEPS // PER_EPOCH - 2), 2)),
    ),
    "linear by epoch": (
        {"schedule": "linear", "schedule_by": "epoch"},
        lambda: once_an_epoch(lambda o: schedulers.LinearLR(o, 1.0, 0.0, total_iters=STEPS // PER_EPOCH)),
    ),
    "polynomial by epoch": (
        {"schedule": "polynomial", "schedule_by": "epoch", "power": 0.9},
        lambda: once_an_epoch(lambda o: schedulers.PolynomialLR(o, STEPS // PER_EPOCH, 0.9)),
    ),
    "step by epoch": (
        {"schedule": "step", "schedule_by": "epoch", "step_epochs": 2.0},
        lambda: once_an_epoch(lambda o: schedulers.StepLR(o, 2, 0.1)),
    ),
    "warm by steps": (
        {"schedule": "constant", "warmup_steps": 7},
        lambda: stepped(lambda o: schedulers.LambdaLR(o, lambda t: min((t + 1) / 7, 1.0))),
    ),
    "not warm": (
        {"schedule": "constant", "warmup_steps": 0, "warmup_epochs": 3.0},
        lambda: stepped(lambda o: schedulers.LambdaLR(o, lambda t: 1.0)),
    ),
}


def one_cycle(optimizer: Any, steps: int, rise: float) -> Any:
    """It raises where it is stepped after the last update: that is left out."""
    scheduler = schedulers.OneCycleLR(optimizer, 0.3, total_steps=steps, pct_start=rise, cycle_momentum=False)
    step = scheduler.step
    scheduler.step = lambda: step() if scheduler.last_epoch < steps - 1 else None
    return scheduler


@pytest.mark.parametrize("name", AGAINST_TORCH)
def test_rates_are_torchs(name: str) -> None:
    settings, expected_of = AGAINST_TORCH[name]
    config = config_module.default()
    config.optim.update({"lr": 0.3, **settings})
    expected = expected_of()
    rate = make_schedule(config, PER_EPOCH, STEPS)
    with jax.enable_x64(True):
        found = [float(rate(jnp.int32(t))) for t in range(STEPS)]
    # torch multiplies some of its rates up step by step, at one rounding each
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-16)
    # float32: a cosine is off by 6e-8 of the full rate
    np.testing.assert_allclose(jax.jit(rate)(np.arange(STEPS)), expected, rtol=1e-5, atol=0.3 * 1e-7)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_a_short_cycle_is_torchs(total: int) -> None:
    """Also where the peak would lie before the first update; of 10 with 0.1 of them it is the first."""
    for rise in (0.3, 0.11):
        config = config_module.default()
        config.optim.update({"lr": 0.3, "schedule": "onecycle", "onecycle_warmup": rise})
        expected = stepped(lambda o, rise=rise: one_cycle(o, total, rise), total)
        np.testing.assert_allclose(make_schedule(config, 4, total)(np.arange(total)), expected, rtol=1e-5, atol=1e-7)
    config.optim.onecycle_warmup = 1 / total if total > 1 else 0.5  # torch divides by 0 there
    assert np.isfinite(make_schedule(config, 4, total)(np.arange(total))).all()


def test_epochs_that_are_not_whole() -> None:
    """Two and a half: the third has the rate that a third of 2.5 has."""
    found = rates(25, schedule="linear", schedule_by="epoch")
    np.testing.assert_allclose(found, np.repeat([1, 0.6, 0.2], 10)[:25], rtol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "batch_size", "peak", "said"),
    [
        ("none", 128, 0.01, ""),
        ("linear", 128, 0.005, "lr 0.005 = 0.01 x 128/256"),
        ("linear", 1024, 0.04, "lr 0.04 = 0.01 x 1024/256"),
        ("sqrt", 1024, 0.02, "lr 0.02 = 0.01 x sqrt(1024/256)"),
    ],
)
def test_the_rate_grows_with_the_batch(scaling: str, batch_size: int, peak: float, said: str) -> None:
    config = config_module.default()
    config.optim.lr_scaling, config.data.batch_size = scaling, batch_size
    assert peak_lr(config) == pytest.approx(peak, rel=1e-15)
    assert scaling_said(config) == said
    config.optim.schedule = "constant"
    np.testing.assert_allclose(make_schedule(config, 1, 3)(np.arange(3)), peak, rtol=1e-6)


@pytest.mark.parametrize(("key", "value"), [("warmup_steps", 10), ("warmup_epochs", 0.96)])
def test_a_warmup_that_is_too_long(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"optim.{key} is {value}; it must be shorter than the run of 10 updates"):
        rates(10, **{key: value})
