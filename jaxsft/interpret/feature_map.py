"""Where a network has maps of the image: which of its modules give one, and what they give, to be differentiated.

No family has to hand its maps out. Modules are called in one order, so that a module's call is known by its number, and
while the whole network is applied what that call gives is caught, and moved by an offset of zeros: the gradient of the
logits with respect to the offset is the one with respect to the map.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.cli import UserError, nearest
from jaxsft.models.families import family_of

HINT = "name a layer that gives a map"


class Call(NamedTuple):
    """A call of a module of a network, and what it gave."""

    number: int  # of all calls, in the order in which they end
    path: tuple[str, ...]
    shape: tuple[int, ...]  # of two images; () where it is no array


class FeatureMap(NamedTuple):
    """A module's output that is a map of the image: [N, height, width, C], or tokens [N, (1 +) height * width, C]."""

    layer: str  # torch's name of the module
    number: int  # of its call
    shape: tuple[int, ...]  # of the output, without N
    height: int  # px of the map
    width: int
    class_token: bool  # whether the first token is none of the image's


def plain(model: nn.Module) -> nn.Module:
    """`model` without rematerialisation, inside which nothing can be caught, and which changes no number."""
    return model.clone(remat=False) if getattr(model, "remat", False) else model


def calls(model: nn.Module, variables: Any, image_size: int) -> list[Call]:
    """The calls of all modules of `model` in evaluation of square images (px). Computes nothing."""
    found: list[Call] = []

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if is_call(context):
            found.append(Call(len(found), context.module.path, getattr(result, "shape", ())))
        return result

    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(note):
        jax.eval_shape(lambda v, x: plain(model).apply(v, x, train=False), variables, images)
    return found


def is_call(context: nn.module.InterceptorContext) -> bool:
    """Whether a module of the network is called, not the network."""
    return context.method_name == "__call__" and bool(context.module.path)


def find(model: nn.Module, arch: str, variables: Any, image_size: int, layer: str = "") -> FeatureMap:
    """The map that a layer of `model` gives.

    Args:
      model: of the architecture `arch`.
      arch: whose family knows torch's names.
      variables: of the model, or their shapes.
      image_size: px, the side of the square images.
      layer: torch's name of a module or of a row of modules, whose last one counts: layer4, layer4.1.conv2, features.
        '': the last map of the network that has more than one pixel; of a vision transformer what the last block's
        attention is given.

    Raises:
      UserError: there is no such layer, or what it gives is no map of the image, or one of a single pixel.
    """
    family = family_of(arch)
    named = [(family.torch_name("/".join(call.path)), call) for call in calls(model, variables, image_size)]
    if layer:
        matching = [(name, call) for name, call in named if name == layer or name.startswith(f"{layer}.")]
        if not matching:
            known = list(dict.fromkeys(name for name, call in named if map_of(name, call)))
            raise UserError(f"{arch} has no layer {layer!r}", nearest(layer, known))
        found = map_of(*matching[-1])
        if not found:
            shape = list(matching[-1][1].shape[1:])
            raise UserError(f"layer {layer} of {arch} gives no map of the image but {shape}", HINT)
        if found.height * found.width == 1:
            what = f"layer {layer} of {arch} gives a map of one pixel of images of {image_size} px"
            raise UserError(what, "name an earlier layer")
        return found
    own = [one for one in named if (re.fullmatch(family.map_layer, one[0]) if family.map_layer else is_own(one[1]))]
    maps = [found for found in (map_of(name, call) for name, call in own) if found and found.height * found.width > 1]
    if not maps:
        raise UserError(f"{arch} has no map of more than one pixel of images of {image_size} px", HINT)
    return maps[-1]


def is_own(call: Call) -> bool:
    """Whether a network's own module, none of one of its modules', gave an image."""
    return len(call.path) == 1 and len(call.shape) == 4


def map_of(name: str, call: Call) -> FeatureMap | None:
    """What a call gave as a map; None where it is none: of tokens, a square and perhaps one before it are a map."""
    shape = call.shape
    if len(shape) not in (3, 4) or shape[0] != 2:
        return None
    if len(shape) == 4:
        return FeatureMap(name, call.number, shape[1:], shape[1], shape[2], False)
    for before in (0, 1):
        side = round((shape[1] - before) ** 0.5)
        if side**2 == shape[1] - before and side:
            return FeatureMap(name, call.number, shape[1:], side, side, bool(before))
    return None


def as_image(values: jax.Array, where: FeatureMap) -> jax.Array:
    """A layer's output, or its gradient, as [N, height, width, C], without the class token."""
    return (
        values[:, int(where.class_token) :].reshape(-1, where.height, where.width, values.shape[-1])
        if (values.ndim == 3)
        else values
    )


def apply(
    model: nn.Module, where: FeatureMap, variables: Any, images: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits [N, K] and what the layer gave [N, *where.shape], in evaluation of normalised images [N, S, S, 3].

    `offset` [N, *where.shape] is added to what the layer gave before the network goes on with it.
    """
    caught: list[jax.Array] = []
    number = -1

    def move(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal number
        result = call(*args, **kwargs)
        if not is_call(context):
            return result
        number += 1
        if number != where.number:
            return result
        caught.append(result)
        return result + offset.astype(result.dtype)

    with nn.intercept_methods(move):
        logits = plain(model).apply(variables, images, train=False)
    (values,) = caught
    return logits, values
