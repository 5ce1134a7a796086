"""TrainState: all that a step changes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxsft.learn import loss_scale


class TrainState(flax.struct.PyTreeNode):
    """Parameters, batch statistics, optimizer state and the number of updates made, one copy on every device.

    Random numbers need no place here: each step derives its key from the seed and `step`.
    """

    step: jax.Array  # int32 scalar
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = None  # {"params", "batch_stats"}: what is evaluated and kept, where train.ema or swa_epochs is on
    loss_scale: Any = None  # of float16, see `loss_scale`

    @classmethod
    def create(
        cls,
        variables: Any,
        optimizer: optax.GradientTransformation,
        with_average: bool = False,
        with_loss_scale: bool = False,
    ) -> TrainState:
        """The state before the first update of {"params", "batch_stats"}; the latter may be absent."""
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        # Compiled: one small program, not one for the zeros of each shape there is (ResNet-50: 0.5 instead of 1.2 s).
        state = cls(jnp.zeros((), jnp.int32), params, batch_stats, jax.jit(optimizer.init)(params))
        if with_average:
            state = state.replace(average=jax.tree.map(jnp.copy, state.variables()))
        return state.replace(loss_scale=loss_scale.create()) if with_loss_scale else state

    def variables(self) -> dict[str, Any]:
        """What the current parameters compute with, for training."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def evaluated(self) -> dict[str, Any]:
        """What is evaluated and exported: the moving average where there is one."""
        return self.variables() if self.average is None else self.average
