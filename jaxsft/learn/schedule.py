"""The learning rate of every update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxsft.cli import UserError

Schedule = Callable[[Any], Any]  # number of an update, from 0 -> its rate


def make_schedule(config: ConfigDict, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The learning rate of update t = 0, 1, ...: linear warm-up, then the named schedule over the remaining steps.

    Warm-up ends at the full rate: update t of W has (t + 1) / W of it, so that the first one already does something.
    "cosine" and "linear" fall to 0 just after the last update; "step" multiplies by `step_factor` at multiples of
    `step_epochs`, in whole updates, counted from the start, as torch's StepLR does.
    """
    c = config.optim
    warmup = round(c.warmup_epochs * steps_per_epoch)
    if warmup >= total_steps and warmup:
        raise UserError(f"config.optim.warmup_epochs is {c.warmup_epochs}", "it must be shorter than the run")
    rest = total_steps - warmup
    period = max(round(c.step_epochs * steps_per_epoch), 1)  # whole: XLA's quotient of 41 by 41 is just below 1

    def factor(t: Any) -> Any:
        done = jnp.clip((t - warmup) / rest, 0.0, 1.0)
        if c.schedule == "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * done))
        if c.schedule == "linear":
            return 1 - done
        if c.schedule == "step":
            return c.step_factor ** (t.astype(int) // period).astype(t.dtype)
        return jnp.ones_like(done)

    def rate(t: Any) -> Any:
        t = jnp.asarray(t, float)  # whole numbers alone would be divided in float32 even where float64 is enabled
        if not warmup:
            return c.lr * factor(t)
        return c.lr * jnp.where(t < warmup, (t + 1) / warmup, factor(t))

    return rate
