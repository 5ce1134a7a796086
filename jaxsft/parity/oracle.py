"""The torch side: what the layers of a network give, and plain SGD on it. Arrays in, arrays out, images NHWC."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Container, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import swin_transformer as swin
from torchvision.ops import MLP, StochasticDepth

from jaxsft.parity.networks import Handed, Masks, hand

Arrays = dict[str, np.ndarray]
Batches = list[tuple[np.ndarray, np.ndarray, Masks]]  # images, labels, and what the network keeps in training
# Modules whose images are [N, H, W, C] in torch, too.
CHANNELS_LAST = (
    nn.Linear, MLP, swin.SwinTransformerBlock, swin.ShiftedWindowAttention, swin.PatchMerging, swin.PatchMergingV2,
)  # fmt: skip
SEEN = 1e-9  # of the largest, in float64: less is a rounding
DRAWS = (nn.Dropout, StochasticDepth, Handed)


def load(model: nn.Module, tensors: Arrays) -> None:
    """Give the model these tensors, strictly."""
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, strict=True)


def state(model: nn.Module) -> Arrays:
    """The state_dict as arrays of their own."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def nchw(images: np.ndarray) -> torch.Tensor:
    """NHWC images as torch wants them."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def channels_last(module: nn.Module) -> bool:
    """Whether a module gives images as [N, H, W, C]."""
    if isinstance(module, CHANNELS_LAST) or type(module) is nn.LayerNorm:  # LayerNorm2d, made from it, is for NCHW
        return True
    return isinstance(module, nn.Sequential) and len(module) > 0 and channels_last(module[-1])


def activations(
    model: nn.Module, images: np.ndarray, train: bool, names: Container[str] = (), masks: Masks = MappingProxyType({})
) -> tuple[torch.Tensor, Arrays]:
    """Logits with their graph, and in their order the outputs of the modules in `names` and of all with parameters.

    Images are NHWC whatever they are in torch. With `train` dropout and stochastic depth keep what `masks` say.
    """
    seen: Arrays = {}
    handles = []
    for name, module in model.named_modules():
        with_parameters = any(True for _ in module.parameters(recurse=False))
        if name and (with_parameters or name in names) and not isinstance(module, DRAWS):

            def keep(module: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
                output = output[0] if isinstance(output, tuple) else output  # attention gives its weights besides
                array = output.detach().numpy().copy()  # a copy: torchvision's ReLU works in place
                turned = array.ndim == 4 and not channels_last(module)
                seen[name] = array.transpose(0, 2, 3, 1) if turned else array

            handles.append(module.register_forward_hook(keep))
    if train:
        hand(model, masks)
    try:
        logits = model.train(train)(nchw(images))
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def loss(logits: torch.Tensor, labels: np.ndarray, smoothing: float, weights: tuple[float, ...]) -> torch.Tensor:
    """torch.nn.CrossEntropyLoss."""
    weight = torch.tensor(weights, dtype=logits.dtype) if weights else None
    return nn.CrossEntropyLoss(weight, label_smoothing=smoothing)(logits, torch.from_numpy(labels).long())


def gradients(model: nn.Module, value: torch.Tensor) -> Arrays:
    """Of every parameter."""
    model.zero_grad()
    value.backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def taken_away(model: nn.Module, images: np.ndarray, masks: Masks, names: Collection[str]) -> set[str]:
    """Those of the parameters `names` that change the logits in evaluation, and in training not at all.

    Such are biases that a batch norm later subtracts with the mean: of a convolution before it, or of the norm at the
    end of a linear bottleneck, which the next 1x1 convolution hands on to its own. All are moved at once.
    """
    before = state(model)
    evaluated, _ = activations(model, images, False)
    seen = gradients(model, evaluated.square().sum())
    least = SEEN * max(float(np.abs(value).max(initial=0)) for value in seen.values())
    logits, _ = activations(model, images, True, masks=masks)
    load(model, before | {name: before[name] + 1 for name in names})
    moved, _ = activations(model, images, True, masks=masks)
    load(model, before)
    if (moved - logits).abs().max() > SEEN * logits.abs().max():
        return set()
    return {name for name in names if np.abs(seen[name]).max() > least}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a comparison trains: SGD with momentum, linear warm-up and a cosine, so that every step has another rate.

    The decay is large on purpose, so that one in the wrong place shows; the rate is a fine-tuner's.
    """

    name: str
    nesterov: bool
    clip_norm: float  # 0 = off
    smoothing: float
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.01
    class_weights: tuple[float, ...] = ()

    def warmup(self, steps: int) -> int:
        """A third of the run, none in a run too short for it."""
        return max(2, steps // 3) if steps >= 4 else 0


def scheduler(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up from 1 / warmup, then a cosine to 0: torch's own schedulers in a row."""
    schedulers = torch.optim.lr_scheduler
    if not warmup:
        return schedulers.CosineAnnealingLR(optimizer, steps)
    rise = schedulers.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    fall = schedulers.CosineAnnealingLR(optimizer, steps - warmup)
    return schedulers.SequentialLR(optimizer, [rise, fall], [warmup])


@dataclasses.dataclass(frozen=True)
class Step:
    """The state after an update, by torch's names."""

    rate: float
    loss: float
    state: Arrays  # parameters and buffers
    momentum: Arrays


def train(model: nn.Module, recipe: Recipe, batches: Batches) -> Iterator[Step]:
    """Train on batches in turn, with the lines of torch's own tutorials."""
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    rates = scheduler(optimizer, recipe.warmup(len(batches)), len(batches))
    model.train()
    for images, labels, masks in batches:
        hand(model, masks)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        value = loss(model(nchw(images)), labels, recipe.smoothing, recipe.class_weights)
        value.backward()
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        rates.step()
        momentum = {name: optimizer.state[p]["momentum_buffer"].numpy().copy() for name, p in model.named_parameters()}
        yield Step(rate, value.item(), state(model), momentum)


def evaluate(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Mean loss, and how many the evaluated model gets right."""
    with torch.no_grad():
        logits = model.eval()(nchw(images))
    right = int((logits.argmax(1).numpy() == labels).sum())
    return float(loss(logits, labels, 0.0, ())), right
