"""What the rest of the program knows of a family of models: one record each, at the end of the family's file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# The last part of a parameter's path -> its kind, by which the options of weight decay know it.
PARAMETER_KINDS: Mapping[str, str] = {
    "kernel": "weight",
    "in_proj_weight": "weight",
    "in_proj_bias": "bias",
    "logit_scale": "weight",
    "scale": "norm",
    "bias": "bias",
    "layer_scale": "layer_scale",
    "class_token": "class_token",
    "pos_embedding": "position_embedding",
    "relative_position_bias_table": "bias_table",
}
ImageSize = int | tuple[int, ...]  # px: the side of a square, or height and width
IMAGE_SIZE = 224  # what torchvision makes its models for


def dotted(path: str) -> str:
    """The name in torch of a module whose modules are named as in torch: `features.3/conv` is `features.3.conv`."""
    return path.replace("/", ".")


class ImageSizeError(ValueError):
    """A network can't take images of this size; its text says which it takes."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models: its architectures, and where things lie in them.

    Every architecture takes the keywords num_classes, head_init, dtype, param_dtype, axis_name, frozen and remat, and
    `dropout` and `stochastic_depth` where it has such; it is called as model(images, train, keys), and maps normalised
    images [N, H, W, 3] to logits [N, num_classes].
    """

    architectures: Mapping[str, Callable[..., nn.Module]]  # as torchvision calls them
    head: str  # the output layer, a module of the network itself; also its name in torch
    # How deep a path lies, for layer-wise learning rates: numbers that grow towards the head, perhaps with gaps.
    stage_of: Callable[[str], int]
    torch_name: Callable[[str], str] = dotted  # of a module's path, such as layer1_0/conv1
    # Of an architecture: those tensors of torch's state_dict that follow from it alone, and are no variables here.
    constants: Callable[[str], Mapping[str, np.ndarray]] = lambda arch: {}
    # What old files call things: regular expressions of torch's names, and what to put in their place.
    renamed: tuple[tuple[str, str], ...] = ()
    # Where variables depend on the image's size: (variables, px) -> the same for images of that side; and the side (px)
    # that tensors by torch's names are for.
    resized: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    image_size_of: Callable[[Mapping[str, np.ndarray]], int] = lambda tensors: IMAGE_SIZE
    # A regular expression of torch's names of modules, the last of which gives the map that Grad-CAM is made of; '':
    # the last module of the network itself that gives an image.
    map_layer: str = ""


def variable_shapes(model: nn.Module, image_size: ImageSize = IMAGE_SIZE) -> dict[str, Any]:
    """Shapes and dtypes of every variable of `model` by collection, "params" and perhaps "batch_stats".

    Computes nothing. `image_size` matters only to models whose variables depend on it.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shapes = _traced_shapes(model, height, width, jax.dtypes.canonicalize_dtype(np.float64))
    return jax.tree.map(lambda shape: shape, shapes)  # a copy, for the caller to change


@functools.cache  # a start asks three times, and to trace ViT-B takes a quarter of a second
def _traced_shapes(model: nn.Module, height: int, width: int, widest: np.dtype) -> dict[str, Any]:
    del widest  # what float64 is to JAX now: float32, unless 64 bits are enabled
    image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    return jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), image)


def init_variables(model: nn.Module, seed: int, image_size: int = IMAGE_SIZE) -> dict[str, Any]:
    """Fresh variables of `model`, in the shapes of `variable_shapes`."""
    image = jnp.zeros((2, image_size, image_size, 3))
    return jax.jit(lambda key: model.init(key, image, train=False))(jax.random.key(seed))
