"""Exported files read back and held against the model they came from, on real images, by who they are for.

All is computed on this machine's CPU, in float32 with all its bits: an accelerator may multiply with fewer, and what is
compared here is the file.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert import names
from convert.reference import has_network, torch_network
from jaxsft import cli
from jaxsft.cli import UserError
from jaxsft.data.augment import normalise, preprocess
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.weights import ModelCard
from jaxsft.ship import onnx_file, stablehlo, state_dict
from jaxsft.ship.facts import as_text, facts

# Of the largest logit. Two ways of summing float32 differ by some hundred roundings of 6e-8; onnxruntime also folds
# batch norm into the convolutions before it, and has other approximations of the error function and the exponential.
TOLERANCE, ONNX_TOLERANCE = 1e-5, 1e-4


class Model(NamedTuple):
    """What was exported."""

    variables: Mapping[str, Any]  # {"params", "batch_stats"}
    card: ModelCard
    step: int


class Pictures(NamedTuple):
    """What to compare on: uint8 [N, H, W, 3], and whether the model's preprocessing has resized and cropped them."""

    images: np.ndarray
    are_cropped: bool


class Agreement(NamedTuple):
    """How far a file's logits are from the model's."""

    difference: float  # the largest, of the largest logit
    tolerance: float
    agreeing: int  # images of the same answer
    images: int
    by: str  # what computed the file's logits

    def __str__(self) -> str:
        off = f"logits within {self.difference:.1e} of the largest (tolerance {self.tolerance:.0e})"
        return f"{off}, the same answer for {self.agreeing} of {self.images} images, by {self.by}"


def check_state_dict(path: Path, model: Model, pictures: Pictures) -> str:
    """Load a .pth or .safetensors strictly into torch's network, and say how its logits agree.

    Without torch, or where torch has no such network, the tensors go back into our variables, which must not change.

    Raises:
      Stop: they do not agree, or the facts are not those of the model.
    """
    tensors, said = state_dict.read(path)
    check_facts(said, as_text(facts(*model)))
    card = model.card
    try:
        known = has_network(card.arch)
    except UserError as error:
        return f"{bit_for_bit(tensors, model)}; {str(error).partition(';')[0]}: no network of its own was run"
    if not known:
        return f"{bit_for_bit(tensors, model)}; torchvision has no {card.arch}: no network of its own was run"
    import torch

    network = torch_network(card.arch, card.num_classes, card.preprocessing.crop_size)
    read = torch.load(path, weights_only=True) if path.suffix == state_dict.PTH else to_tensors(tensors)
    network.load_state_dict(read, strict=True)
    network.eval()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(images)).numpy()

    x = np.ascontiguousarray(prepared(card, pictures).transpose(0, 3, 1, 2))
    return str(agreement(logits(model, pictures), in_two(run, x), card, TOLERANCE, f"PyTorch {torch.__version__}"))


def check_stablehlo(path: Path, model: Model, pictures: Pictures) -> str:
    """Deserialize a .stablehlo, and say how its logits agree.

    Raises:
      Stop: they do not, or the facts are not those of the model.
    """
    program, said = stablehlo.read(path)
    size = None if pictures.are_cropped else pictures.images.shape[1:3]
    check_facts(said, json.loads(json.dumps(facts(*model, stablehlo.taken(model.card.preprocessing, size)))))
    with on_cpu():
        found = in_two(lambda images: np.asarray(program.call(images)), pictures.images)
    return str(agreement(logits(model, pictures), found, model.card, TOLERANCE, f"JAX {jax.__version__}"))


def check_onnx(path: Path, model: Model, pictures: Pictures, *, inside: bool, tolerance: float = ONNX_TOLERANCE) -> str:
    """Run a .onnx in onnxruntime, and say how its logits agree.

    Args:
      path: of the file.
      model: which was exported.
      pictures: to compare on.
      inside: whether the preprocessing is part of the graph.
      tolerance: of the largest logit.

    Raises:
      Stop: they do not agree, or the facts are not those of the model.
      UserError: onnxruntime is not installed.
    """
    runtime = import_onnxruntime()
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    expected = as_text(facts(*model))
    check_facts({name: text for name, text in said.items() if name in expected}, expected)
    x = pictures.images
    if not inside:
        x = np.ascontiguousarray(prepared(model.card, pictures).transpose(0, 3, 1, 2))
    found = in_two(lambda images: session.run([onnx_file.OUTPUT], {onnx_file.INPUT: images})[0], x)
    by = f"onnxruntime {runtime.__version__}"
    return str(agreement(logits(model, pictures), found, model.card, tolerance, by))


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises UserError where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed", "pip install 'jaxsft[onnx]'") from None
    return onnxruntime


def agreement(expected: np.ndarray, found: np.ndarray, card: ModelCard, tolerance: float, by: str) -> Agreement:
    """Hold logits [N, K] against the model's.

    Raises:
      UserError: the model computes no numbers.
      Stop: they differ by more than `tolerance` of the largest.
    """
    if not np.isfinite(expected).all():
        raise UserError("the network computes no numbers", "take another --checkpoint")
    largest = float(np.abs(expected).max()) or 1.0  # of a head of zeros all logits are 0
    difference = float(np.abs(found - expected).max()) / largest if found.shape == expected.shape else float("inf")
    same = (found > 0) == (expected > 0) if card.multi_label else found.argmax(-1) == expected.argmax(-1)
    agreeing = int(same.all(-1).sum() if card.multi_label else same.sum())
    result = Agreement(difference, tolerance, agreeing, len(expected), by)
    if not difference <= tolerance:  # NaN neither
        raise cli.Stop(f"what was exported does not agree with the model: {result}", "nothing was written")
    return result


def check_facts(said: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise a Stop where a file says other things of its model than it should."""
    differing = sorted(name for name in said.keys() | expected.keys() if said.get(name) != expected.get(name))
    if differing:
        raise cli.Stop(f"what was exported does not tell its {', '.join(differing)}", "nothing was written")


def bit_for_bit(tensors: Mapping[str, np.ndarray], model: Model) -> str:
    """Say that tensors by torch's names are the model's. Raises a Stop where they are not."""
    expected = names.to_torch(model.variables, model.card.arch)
    if tensors.keys() != expected.keys() or not all(np.array_equal(tensors[name], expected[name]) for name in expected):
        raise cli.Stop("what was exported are other numbers than the model's", "nothing was written")
    return f"its {len(tensors)} tensors are the model's, bit for bit"


def prepared(card: ModelCard, pictures: Pictures) -> np.ndarray:
    """Pictures as the model takes them, float32 [N, crop_size, crop_size, 3]."""
    to = card.preprocessing
    with on_cpu():
        if pictures.are_cropped:
            return np.asarray(normalise(jnp.asarray(pictures.images, jnp.float32), to))
        return np.asarray(jax.jit(functools.partial(preprocess, to=to))(pictures.images))


def logits(model: Model, pictures: Pictures) -> np.ndarray:
    """What the model itself makes of pictures, float32 [N, num_classes]."""
    network = ARCHITECTURES[model.card.arch](num_classes=model.card.num_classes)
    with on_cpu():
        variables = jax.tree.map(np.asarray, model.variables)
        body = jax.jit(functools.partial(network.apply, train=False))
        return np.asarray(body(variables, prepared(model.card, pictures)))


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Let JAX compute on the CPU for a while, where it may use one; with float32's products in full anywhere."""
    stack = contextlib.ExitStack()
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS names others alone
        stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
    stack.enter_context(jax.default_matmul_precision("highest"))
    return stack


def in_two(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """`run` on one image and on all others at once: a form that takes any number takes these two."""
    return np.concatenate([run(part) for part in (images[:1], images[1:]) if len(part)])


def to_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as torch's tensors."""
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}
