"""How fast a step is: this program's, and PyTorch's or a plain Flax model's, in turns."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.bench import apart, step
from jaxsft.bench.plain import plain_model
from jaxsft.learn.state import TrainState
from jaxsft.models.family import init_variables
from jaxsft.run.parallel import all_devices

Step = Callable[[], Any]  # makes one step and returns what to wait for
Turn = Callable[[int], float]  # makes so many steps; the seconds that they take
LAYOUTS = ("channels_last", "NCHW")
KINDS = ("train", "eval")
OTHERS = ("torch", "torch.compile", "flax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench train`."""
    step.add_arguments(parser, arch="resnet18", batch_size=32, precision="float32")
    parser.add_argument("--against", nargs="+", choices=OTHERS, default=[], help="torch: the better of both layouts")
    parser.add_argument(
        "--rounds", type=step.whole, default=7, help="turns of each; the median counts; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=step.above_zero, default=2.0, help="a turn takes about so long; default: %(default)s"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: both")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return it.

    On a CPU each contestant is measured in a process of its own, in turns, and that is what counts; and then all of
    them in one process ("together"), where the threads of two disturb each other. An accelerator is one process's.

    Returns:
      "images_per_sec", "step_seconds" (median) and "compile_seconds" of the train step; with `--against` the same of
      each other under "against"; "ratio", ours over the first of them; under "together" all of it in one process, where
      that was measured beside; and under "eval" all of it for evaluation.

    Raises:
      UserError: the batch does not split over the devices, or a package is missing.
    """
    config = step.config_of(args)
    all_devices(config).check_batch(args.batch_size)
    is_cpu = jax.devices()[0].platform == "cpu"
    record: dict[str, Any] = {}
    for kind in args.kinds:
        names = ["jaxsft", *(own for name in args.against for own in ([f"torch ({layout})" for layout in LAYOUTS]
                             if name == "torch" else [name]))]  # fmt: skip
        together = in_turns({name: functools.partial(timed, step_of(args, name, kind)) for name in names}, args)
        result = together
        if is_cpu and args.against:
            made = {name: (turn_of, of_numbers(args), name, kind) for name in names}
            with apart.contestants(made) as contestants:
                result = in_turns(contestants, args)
            tell(f"{kind}, a process each", result)
            tell(f"{kind}, in one process", together)
            result["together"] = together
        else:
            tell(kind, result)
        record.update(result if kind == "train" else {"eval": result})
    return record


def of_numbers(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments without what can't be sent to another process."""
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if not callable(value)})


def turn_of(args: argparse.Namespace, name: str, kind: str) -> Turn:
    """A contestant's turn, in its process."""
    return functools.partial(timed, step_of(args, name, kind))


def step_of(args: argparse.Namespace, name: str, kind: str) -> Step:
    """A contestant's step."""
    if name == "jaxsft":
        return ours(step.config_of(args), kind)
    if name == "flax":
        model = plain_model(args.arch, step.CLASSES, jnp.dtype(args.precision))
        return ours(step.config_of(args), kind, model)
    if name == "torch.compile":
        return torchs(args, kind, "channels_last", compiled=True)
    return torchs(args, kind, name.removeprefix("torch (").removesuffix(")"))


def in_turns(turns: Mapping[str, Turn], args: argparse.Namespace) -> dict[str, Any]:
    """One turn of each in every round; of a turn its mean step, of the rounds the median.

    The first step of a turn is not timed: it takes back from the kernel the memory that the last turn let go, which no
    step in a row of them has to.
    """
    compile_seconds = {name: turn(1) for name, turn in turns.items()}
    counts = {name: max(round(args.seconds / turn(1)), 1) for name, turn in turns.items()}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(args.rounds):
        for name, turn in turns.items():
            turn(1)
            seconds[name].append(turn(counts[name]) / counts[name])
    results = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        results[name] = {
            "images_per_sec": args.batch_size / median,
            "step_seconds": median,
            "compile_seconds": compile_seconds[name],
        }
    mine = results.pop("jaxsft")
    layouts = {name: results.pop(name) for name in list(results) if name.startswith("torch (")}
    if layouts:
        better = min(layouts, key=lambda name: layouts[name]["step_seconds"])
        results = {"torch": {**layouts[better], "layout": better[7:-1]}, **results}
    if not results:
        return mine
    results = {name: results[name] for name in args.against}
    return {**mine, "against": results, "ratio": mine["images_per_sec"] / results[args.against[0]]["images_per_sec"]}


def timed(one: Step, count: int) -> float:
    """Seconds that `count` steps take until the last of them is done."""
    began = time.perf_counter()
    for _ in range(count):
        result = one()
    wait = getattr(result, "wait", None)
    wait() if wait else jax.block_until_ready(result)
    return time.perf_counter() - began


def tell(kind: str, result: dict[str, Any]) -> None:
    """Print one row."""
    said = f"{kind}: images/s jaxsft {result['images_per_sec']:.1f}"
    for name, other in result.get("against", {}).items():
        ratio = result["images_per_sec"] / other["images_per_sec"]
        layout = f", {other['layout']}" if "layout" in other else ""
        said += f"  {name} {other['images_per_sec']:.1f} (ratio {ratio:.2f}{layout})"
    cli.say(said)


def ours(config: ConfigDict, kind: str, model: Any = None) -> Step:
    """This program's step on all devices; with `model` the same around another network."""
    parallel = all_devices(config)
    steps = step.make_steps(config, parallel, model)
    variables = init_variables(steps.model, config.seed, config.data.image_size)
    random = np.random.default_rng(0)
    batch = {name: random.integers(0, 256, leaf.shape).astype(leaf.dtype) for name, leaf in steps.batch.items()}
    state = parallel.replicate(TrainState.create(variables, steps.optimizer, with_average=False))
    if kind == "eval":
        placed = parallel.split({**batch, "mask": np.ones(config.data.batch_size, bool)})
        return lambda: steps.evaluate(state.evaluated(), {}, placed)
    placed, arguments = parallel.split(batch), parallel.replicate(steps.arguments)

    def update() -> Any:
        nonlocal state
        state, counts = steps.train(state, arguments, placed)
        return counts

    return update


class Ticket:
    """What a torch step leaves: waiting for it waits for the device."""

    def __init__(self, synchronise: Callable[[], None]):
        self.wait = synchronise


def torchs(args: argparse.Namespace, kind: str, layout: str, compiled: bool = False) -> Step:
    """torchvision's model and torch's SGD with momentum, on its GPU where it has one; images are ready and float32."""
    try:
        import torch
        import torchvision  # noqa: F401
    except ImportError:
        raise step.missing("torchvision", "torch") from None
    from convert.reference import torchvision_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ticket = Ticket(torch.cuda.synchronize if device == "cuda" else lambda: None)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = (
        torchvision_model(args.arch, step.CLASSES, args.image_size)
        .to(device=device, memory_format=memory)
        .train(kind == "train")
    )
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size).to(device=device, memory_format=memory)
    labels = torch.randint(0, step.CLASSES, (args.batch_size,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    precision = torch.autocast(device, torch.bfloat16, enabled=args.precision == "bfloat16")
    call = torch.compile(model) if compiled else model

    def update() -> Ticket:
        with precision:
            loss = torch.nn.functional.cross_entropy(call(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return ticket

    def evaluate() -> Ticket:
        with torch.inference_mode(), precision:
            call(images).argmax(1)
        return ticket

    return update if kind == "train" else evaluate
