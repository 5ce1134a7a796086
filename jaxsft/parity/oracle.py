"""The torch side: torchvision's models, what their layers give, and plain SGD on them. Arrays in, arrays out."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from convert.make_sample import resnet10_w16
from jaxsft.cli import UserError

Arrays = dict[str, np.ndarray]
NOT_IN_TORCHVISION = {"resnet10_w16": resnet10_w16}  # architectures that torchvision has not
LAST_NORM = {BasicBlock: "bn2", Bottleneck: "bn3"}  # of torchvision's residual blocks


def build(arch: str, num_classes: int, seed: int = 0) -> nn.Module:
    """torchvision's model in its own initialisation, with batch norm moved off its trivial values.

    Raises:
      UserError: torchvision has no such model.
    """
    torch.manual_seed(seed)
    if arch in torchvision.models.list_models():
        model = torchvision.models.get_model(arch, num_classes=num_classes)
    elif arch in NOT_IN_TORCHVISION:
        model = NOT_IN_TORCHVISION[arch](num_classes)
    else:
        raise UserError(f"torchvision has no {arch}", "compare one of its own architectures")
    last_norms = {getattr(block, LAST_NORM[type(block)]) for block in model.modules() if type(block) in LAST_NORM}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The last one of a block is small, as after training: a deep network of fresh full-size blocks is chaotic,
            # torch's own float32 then leaves its own float64 by 8 % of the loss within five steps of a ResNet-50.
            nn.init.uniform_(module.weight, *((0.0, 0.1) if module in last_norms else (0.5, 1.0)))
            nn.init.normal_(module.bias, 0, 0.1)
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model


def load(model: nn.Module, tensors: Arrays) -> None:
    """Give the model these tensors, strictly."""
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, strict=True)


def state(model: nn.Module) -> Arrays:
    """The state_dict as arrays of their own."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def nchw(images: np.ndarray) -> torch.Tensor:
    """NHWC images as torch wants them."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def activations(
    model: nn.Module, images: np.ndarray, train: bool, names: Container[str] = ()
) -> tuple[torch.Tensor, Arrays]:
    """Logits with their graph, and in their order the outputs of the modules in `names` and of all with parameters."""
    seen: Arrays = {}
    handles = []
    for name, module in model.named_modules():
        if name in names or any(True for _ in module.parameters(recurse=False)):

            def keep(module: nn.Module, arguments: Any, output: torch.Tensor, name: str = name) -> None:
                seen[name] = output.detach().numpy().copy()  # a copy: torchvision's ReLU works in place

            handles.append(module.register_forward_hook(keep))
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


def train(model: nn.Module, recipe: Recipe, batches: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Step]:
    """Train on (images, labels) in turn, with the lines of torch's own tutorials."""
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    rates = scheduler(optimizer, recipe.warmup(len(batches)), len(batches))
    model.train()
    for images, labels in batches:
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
