"""The learning rate of every update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxsft.cli import UserError

Schedule = Callable[[Any], Any]  # number of an update, from 0 -> its rate
BASE_BATCH = 256  # images, that a scaled optim.lr is for
DIVISOR, FINAL_DIVISOR = 25.0, 1e4  # of torch's OneCycleLR: the peak by its start, and its start by its end


def peak_lr(config: ConfigDict) -> float:
    """The rate before the schedule lowers it: optim.lr, scaled to the batch as optim.lr_scaling says.

    "linear" is Goyal et al. 2017 (arXiv:1706.02677).
    """
    share = config.data.batch_size / BASE_BATCH
    return float(config.optim.lr * {"none": 1.0, "linear": share, "sqrt": math.sqrt(share)}[config.optim.lr_scaling])


def scaling_said(config: ConfigDict) -> str:
    """How the peak comes about, such as `lr 0.005 = 0.01 x 128/256`; '' where it is optim.lr."""
    if config.optim.lr_scaling == "none":
        return ""
    share = f"{config.data.batch_size}/{BASE_BATCH}"
    share = share if config.optim.lr_scaling == "linear" else f"sqrt({share})"
    return f"lr {peak_lr(config):.4g} = {config.optim.lr:g} x {share}"


def warmup_steps(config: ConfigDict, steps_per_epoch: int, total_steps: int) -> int:
    """Updates over which the rate rises.

    Raises:
      UserError: they are not fewer than those of the run.
    """
    c = config.optim
    key, given = ("warmup_epochs", c.warmup_epochs) if c.warmup_steps is None else ("warmup_steps", c.warmup_steps)
    steps = round(c.warmup_epochs * steps_per_epoch) if c.warmup_steps is None else c.warmup_steps
    if steps >= total_steps and steps:
        raise UserError(f"config.optim.{key} is {given}", f"it must be shorter than the run of {total_steps} updates")
    return int(steps)


def make_schedule(config: ConfigDict, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The learning rate of update t = 0, 1, ...: linear warm-up, then the named schedule over the remaining steps.

    Warm-up ends at the full rate: update t of W has (t + 1) / W of it, so that the first one already does something.
    "cosine", "linear" and "polynomial" fall to 0 just after the last update; "step" multiplies by `step_factor` at
    multiples of `step_epochs`, in whole updates, counted from the start, as torch's StepLR does; "onecycle" is torch's
    OneCycleLR(anneal_strategy="cos", cycle_momentum=False). With schedule_by "epoch" every update has the rate of its
    epoch, which is what this gives where an update is an epoch.

    Raises:
      UserError: the warm-up is as long as the run, or longer.
    """
    c, lr = config.optim, peak_lr(config)
    warmup = warmup_steps(config, steps_per_epoch, total_steps)
    rest = total_steps - warmup
    period = max(round(c.step_epochs * steps_per_epoch), 1)  # whole: XLA's quotient of 41 by 41 is just below 1
    unit = steps_per_epoch if c.schedule_by == "epoch" else 1  # updates of one rate

    def factor(t: Any) -> Any:
        done = jnp.clip((t - warmup) / rest, 0.0, 1.0)
        if c.schedule == "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * done))
        if c.schedule == "linear":
            return 1 - done
        if c.schedule == "polynomial":
            return (1 - done) ** c.power
        if c.schedule == "step":
            return c.step_factor ** (t.astype(int) // period).astype(t.dtype)
        if c.schedule == "onecycle":
            return one_cycle(t, total_steps, c.onecycle_warmup)
        return jnp.ones_like(done)

    def rate(t: Any) -> Any:
        if unit > 1:
            t = jnp.asarray(t).astype(int) // unit * unit
        t = jnp.asarray(t, float)  # whole numbers alone would be divided in float32 even where float64 is enabled
        if not warmup:
            return lr * factor(t)
        return lr * jnp.where(t < warmup, (t + unit) / warmup, factor(t))

    return rate


def one_cycle(t: Any, total_steps: int, rise: float) -> Any:
    """The share of the peak that update t of `total_steps` has: half a cosine up over the share `rise`, another down.

    Smith & Topin 2017 (arXiv:1708.07120), as torch.optim.lr_scheduler.OneCycleLR computes it.
    """
    top, end = rise * total_steps - 1, total_steps - 1  # the updates at the peak and at the end; the first may be none
    first, last = 1 / DIVISOR, 1 / DIVISOR / FINAL_DIVISOR

    def between(start: float, stop: float, done: Any) -> Any:
        return stop + (start - stop) / 2 * (1 + jnp.cos(jnp.pi * done))

    up = between(first, 1.0, t / top) if top > 0 else jnp.ones_like(t)
    down = between(1.0, last, (t - top) / (end - top)) if end > top else up
    return jnp.where((t <= top) & (top > 0), up, down)
