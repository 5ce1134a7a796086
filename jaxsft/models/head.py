"""The output layer by itself, and what comes into it: for who trains it alone, on features that are computed once.

No family has to say where its body ends. Wherever the output layer lies, and whatever pooling, norms and hidden layers
come before it, what it is called with is caught while the whole network is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.cli import UserError
from jaxsft.models.layers import Linear
from jaxsft.models.stochastic import Dropout, Keys


class Head(nn.Module):
    """The dropout right before the output layer of a network, where it has one, and that layer.

    From features [N, C] to logits [N, num_classes]. It takes the variables of the whole network and looks at its own
    alone, so that it trains, and is evaluated, in the whole network's place. The dropout draws what it does there.
    """

    layer: str  # path of the output layer in the network
    num_classes: int
    dropout: str = ""  # path of the dropout; '': there is none
    rate: float = 0.0  # of it
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        if self.dropout:
            x = Dropout(self.rate, name=self.dropout)(x, keys)
        return Linear(self.num_classes, param_dtype=self.param_dtype, name=self.layer)(x)


class Entering(NamedTuple):
    """What an output layer is called with, the layer, and the module that was called last before it."""

    features: jax.Array
    layer: nn.Module
    before: nn.Module | None


def entering(model: nn.Module, path: str, variables: dict[str, Any], images: jax.Array) -> Entering:
    """What comes into the output layer `path` of `model` for `images` [N, H, W, 3], in evaluation.

    The features are [N, C], float32 at least.

    Raises:
      UserError: the network does not call such a layer once.
    """
    found: list[Entering] = []
    called: list[nn.Module] = []

    def catch(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if "/".join(context.module.path) == path:
            found.append(Entering(args[0], context.module, called[-1] if called else None))
        result = call(*args, **kwargs)
        called.append(context.module)
        return result

    with nn.intercept_methods(catch):
        model.apply(variables, images, train=False)
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__} calls its output layer {path} {len(found)} times: it has no features to keep",
            "set --noconfig.train.keep_features",
        )
    return found[0]


def head_of(model: nn.Module, path: str, variables: Any, image_size: int) -> Head:
    """The output layer `path` of `model`, with the dropout right before it; `variables` may be shapes.

    Computes nothing. `image_size`: px, the side of a square.

    Raises:
      UserError: it is no linear layer, or is not called once.
    """
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    seen: list[Entering] = []
    jax.eval_shape(lambda v, x: seen.append(entering(model, path, v, x)), variables, image)
    ((_, layer, before),) = seen
    if not isinstance(layer, Linear):
        raise UserError(
            f"the output layer {path} is a {type(layer).__name__}, no linear layer",
            "set --noconfig.train.keep_features",
        )
    head = Head(path, layer.features, param_dtype=layer.param_dtype)
    if isinstance(before, Dropout) and len(before.path) == 1:
        head = head.clone(dropout=before.path[0], rate=before.rate)
    return head
