"""The walk through every quantity: weights, activations, losses, gradients, steps of training, evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax.linen import Module
from torch import nn

from convert import names
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.parity import networks, oracle, ours
from jaxsft.parity.oracle import Arrays, Recipe
from jaxsft.parity.table import JUMPS, TAKEN_AWAY, Row, compared, held, identical, jumps, tolerance

BLIND = 1e-3  # of the largest logit: where the images of a batch differ by less, an error could hide


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared, on what."""

    arch: str
    dtype: str = "float32"  # 'float32' | 'float64'
    steps: int = 10
    batch_size: int = 8
    image_size: tuple[int, int] = (64, 64)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays that both sides are fed: images [N, H, W, 3] as the model sees them, labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray


def inputs(options: Options, num_classes: int, number: int) -> Inputs:
    """Batch `number` of a comparison: normal noise, another for every number."""
    rng = np.random.default_rng([options.seed, number])
    shape = (options.batch_size, *options.image_size, 3)
    images = rng.standard_normal(shape).astype(options.dtype)
    return Inputs(images, rng.integers(num_classes, size=options.batch_size, dtype=np.int32))


def class_weights(num_classes: int) -> tuple[float, ...]:
    """From 0.5 for the first class to 2 for the last."""
    return tuple(np.geomspace(0.5, 2.0, num_classes).tolist())


def recipes(num_classes: int) -> tuple[Recipe, ...]:
    """Momentum with and without Nesterov, with and without clipping, smoothing and class weights."""
    return (
        Recipe("sgd", nesterov=False, clip_norm=0.0, smoothing=0.0),
        Recipe("nesterov", nesterov=True, clip_norm=1.0, smoothing=0.1, class_weights=class_weights(num_classes)),
    )


def model_for(options: Options, num_classes: int) -> Module:
    """Our model, parameters and arithmetic in the dtype of the comparison."""
    dtype = jnp.dtype(options.dtype)
    return ARCHITECTURES[options.arch](num_classes=num_classes, dtype=dtype, param_dtype=dtype)


def compare(options: Options, model: Module, torch_model: nn.Module) -> Iterator[Row]:
    """Every row, in the order of computation, from the weights that `torch_model` holds; it is changed by training.

    In float64 both sides compute in it, and whatever consumes the rows must do so under `jax.enable_x64(True)`; in
    both dtypes under `jax.default_matmul_precision("highest")`.
    """
    dtype = np.dtype(options.dtype)
    assert jnp.zeros((), dtype).dtype == dtype, "float64 needs jax.enable_x64(True)"
    torch_model.double() if dtype == np.float64 else torch_model.float()
    start = oracle.state(torch_model)
    values = ours.variables(model, start, options.arch, options.image_size)
    yield identical("weights/torch to Flax to torch", names.to_torch(values, options.arch), start)

    yield from eval_rows(options, model, values, torch_model)
    yield from train_rows(options, model, values, torch_model)
    oracle.load(torch_model, start)
    evaluate = ours.evaluator(model, options.arch)
    for recipe in recipes(model.num_classes) if options.steps else ():
        yield from step_rows(options, model, values, torch_model, recipe, evaluate)
        oracle.load(torch_model, start)


def eval_rows(options: Options, model: Module, values: dict, torch_model: nn.Module) -> Iterator[Row]:
    """Activations and logits in evaluation."""
    images = inputs(options, model.num_classes, 0).images
    found = ours.forward(model, options.arch, values, images, train=False)
    _, expected = oracle.activations(torch_model, images, False, found)
    yield from activation_rows("eval", found, expected, options)
    logits = expected[family_of(options.arch).head]
    spread = float((logits.max(0) - logits.min(0)).max() / np.abs(logits).max())
    yield held("eval/logits depend on the image", spread > BLIND, f"by {spread:.0e} of the largest")


def train_rows(options: Options, model: Module, values: dict, torch_model: nn.Module) -> Iterator[Row]:
    """Activations in training, losses, the buffers that one batch moved, gradients."""
    batch = inputs(options, model.num_classes, 0)
    weights = class_weights(model.num_classes)
    losses = {"plain": (0.0, ()), "smoothed": (0.1, ()), "weighted": (0.0, weights), "both": (0.1, weights)}
    found = ours.trained(model, options.arch, values, batch.images, batch.labels, losses)
    logits, outputs = oracle.activations(torch_model, batch.images, True, found.outputs, found.masks)
    yield from activation_rows("train", found.outputs, outputs, options)
    for name, (smoothing, class_weight) in losses.items():
        value = oracle.loss(logits, batch.labels, smoothing, class_weight)
        allowed = tolerance("loss", options.dtype)
        yield compared(f"train/loss/{name}", found.losses[name], value.item(), allowed)
    buffers = oracle.state(torch_model)
    yield from state_rows("train", found.buffers, {k: buffers[k] for k in found.buffers}, "", options.dtype)
    plain = oracle.loss(logits, batch.labels, 0.0, ())
    expected = oracle.gradients(torch_model, plain)
    moved = options.dtype == "float32" and jumps(found.outputs, outputs)
    yield from gradient_rows(options, found.gradients, expected, torch_model, found.masks, int(moved))


def gradient_rows(
    options: Options, found: Arrays, expected: Arrays, torch_model: nn.Module, masks: networks.Masks, moved: int
) -> Iterator[Row]:
    """Every parameter's gradient, and whether the loss depends on every parameter that it can depend on.

    Of `moved` activations, in float32, the gradient jumps (see `table.jumps`).

    A gradient that is zero by mathematics is a rounding on both sides, and has a row of its own kind: it is held
    relative to the network's largest.
    """
    allowed, coarse = (
        tolerance("gradient that jumps" if moved else "gradient", options.dtype),
        options.dtype == "float32",
    )
    why = JUMPS if moved else ""
    largest = max(float(np.abs(value).max(initial=0)) for value in expected.values())
    # In float32 a rounding may be as large as a gradient: only what is 0 is known to be none.
    least = 0.0 if coarse else oracle.SEEN * largest
    unseen = [name for name, value in expected.items() if not np.abs(value).max(initial=0) > least]
    images = inputs(options, len(found[f"{family_of(options.arch).head}.bias"]), 0).images
    zero = oracle.taken_away(torch_model, images, masks, unseen) if unseen and not coarse else set()
    for name in sorted(expected, key=zero.__contains__):  # in torch's order, but for these, which come last
        kind, scale = (TAKEN_AWAY, largest) if name in zero else ("gradient", largest if coarse else None)
        yield compared(f"train/{kind}/{name}", found[name], expected[name], allowed, scale, why)
    hidden = ", ".join(name for name in unseen if name not in zero)
    yield held("train/loss depends on every parameter", not hidden, f"not on {hidden}")


def activation_rows(phase: str, found: Arrays, expected: Arrays, options: Options) -> Iterator[Row]:
    """Every module's output, in torch's order; the head's are the logits."""
    kind, dtype = "activation" if phase == "eval" else f"{phase} activation", options.dtype
    for name, value in expected.items():
        if name == family_of(options.arch).head:
            allowed = tolerance("logits" if phase == "eval" else kind, dtype)
            yield compared(f"{phase}/logits", found[name], value, allowed)
        else:
            yield compared(f"{phase}/activation/{name}", found[name], value, tolerance(kind, dtype))


def rows(
    prefix: str, found: Arrays, expected: Arrays, allowed: float, together: bool = False, why: str = ""
) -> Iterator[Row]:
    """One row a tensor, in torch's order; `together` relative to the largest value of all; `why` it is held loosely."""
    largest = max(float(np.abs(value).max(initial=0)) for value in expected.values()) if together else None
    for name, value in expected.items():
        yield compared(f"{prefix}/{name}", found[name], value, allowed, largest, why)


def state_rows(phase: str, found: Arrays, expected: Arrays, when: str, dtype: str) -> Iterator[Row]:
    """Parameters and buffers of a state_dict; `when` is "step " inside a run and makes the tolerances a run's."""
    kinds = {"running_mean": "statistics", "running_var": "statistics", "num_batches_tracked": ""}
    for leaf, kind in kinds.items():
        allowed = tolerance(when + kind if kind else "exact", dtype)
        names_ = [name for name in expected if name.endswith(leaf)]
        yield from rows(f"{phase}/{leaf}", found, {name: expected[name] for name in names_}, allowed)


def step_rows(
    options: Options, model: Module, values: dict, torch_model: nn.Module, recipe: Recipe, evaluate: ours.Evaluate
) -> Iterator[Row]:
    """After every update: its rate, the loss, parameters, momentum, running statistics, counters; then evaluation."""
    dtype = options.dtype
    batches = [inputs(options, model.num_classes, 1 + number) for number in range(options.steps)]
    draw = ours.drawer(model, options.arch, values)
    arrays = [(batch.images, batch.labels, draw(batch.images, step)) for step, batch in enumerate(batches)]
    both = zip(
        ours.train(model, options.arch, values, recipe, arrays), oracle.train(torch_model, recipe, arrays), strict=True
    )
    peak = 0.0  # at its end a cosine's rate is the difference of two numbers near 1: a rounding is of the peak
    for number, (found, expected) in enumerate(both, 1):
        phase, peak = f"{recipe.name}/step {number:02d}", max(peak, float(expected.rate))
        yield compared(f"{phase}/rate", found.rate, expected.rate, tolerance("rate", dtype), peak)
        yield compared(f"{phase}/loss", found.loss, expected.loss, tolerance("step loss", dtype))
        parameters = {name: expected.state[name] for name in expected.momentum}
        yield from rows(f"{phase}/parameter", found.state, parameters, tolerance("step parameter", dtype))
        allowed, coarse = tolerance("step momentum", dtype), dtype == "float32"
        yield from rows(
            f"{phase}/momentum", found.momentum, expected.momentum, allowed, coarse, JUMPS if coarse else ""
        )
        yield from state_rows(phase, found.state, expected.state, "step ", dtype)

    # Evaluation by running statistics that have seen a few batches only: on the first batch that was trained on.
    images, labels, _ = arrays[0]
    loss, right = evaluate(found.state, images, labels)
    expected_loss, expected_right = oracle.evaluate(torch_model, images, labels)
    yield compared(f"{recipe.name}/evaluation/loss", loss, expected_loss, tolerance("step loss", dtype))
    yield compared(f"{recipe.name}/evaluation/accuracy", right, expected_right, tolerance("exact", dtype))
