"""What the train step costs on devices that are not here: their compiler compiles it, and says, without one of them."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxsft import cli
from jaxsft.bench import hlo, step
from jaxsft.bench.plain import plain_model
from jaxsft.models.precision import said
from jaxsft.run.parallel import AXIS, DataParallel


class Absent(NamedTuple):
    """Devices that are not here, all alike, and the limits of one, as its vendor states them."""

    name: str  # of all of them, for people
    kind: str  # what one is called: "chip"
    devices: list[Any]
    flops: float  # a second
    bandwidth: float  # bytes a second, of its memory
    memory: float  # bytes
    cost: Callable[[Any], dict[str, float]]  # of a compiled step: what `run` returns of its FLOPs and bytes


def add_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The options that they share."""
    step.add_arguments(parser, arch="resnet50", batch_size=batch_size, precision="bfloat16")
    parser.add_argument("--plain", action="store_true", help="the network written from Flax's own layers instead")
    parser.add_argument("--largest", action="store_true", help="find the largest batch one holds; compiles it too")


def run(args: argparse.Namespace, absent: Absent) -> dict[str, Any]:
    """Compile, print a table, and return it.

    Returns:
      A device's "flops_per_step", "bytes_per_step" (read and written, as its compiler counts), "memory_bytes_per_step"
      (those of its main memory), "temp_bytes", "argument_bytes", "collective_bytes_per_step" and "collectives" (their
      number by kind), "gradient_bytes", "roofline_seconds" (the larger of FLOPs and bytes of main memory over its
      rates), "compile_seconds", and "largest_batch_size" of all devices; what else `absent.cost` gives; and the
      "precision" of the numbers, for people.

    Raises:
      UserError: a batch that does not split or does not fit.
    """
    config = step.config_of(args)
    parallel = DataParallel(config.parallel.backend, absent.devices, matmul_precision=config.train.matmul_precision)
    model = plain_model(args.arch, step.CLASSES, jnp.dtype(args.precision)) if args.plain else None
    record = measure(config, parallel, absent, model)
    record["precision"] = said(args.precision, args.matmul_precision, parallel.devices)
    if args.largest:
        record["largest_batch_size"] = largest(config, parallel, absent, record, model)
    tell(args, absent, record)
    return record


def topology(kind: str, **named: str) -> list[Any]:
    """The devices of a topology that is not there. Raises whatever the compiler says of one that can't be."""
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    return list(topologies.get_topology_desc(platform=kind, **named).devices)


def lowered(steps: step.Steps, config: Any, parallel: DataParallel) -> Any:
    """The train step, traced for the devices of `parallel`."""
    count = len(parallel.devices)

    def placed(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape = leaf.shape
        if spec and config.parallel.backend == "pmap":
            shape = (count, shape[0] // count, *shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(parallel.mesh, spec))

    state = jax.tree.map(lambda leaf: placed(leaf, PartitionSpec()), steps.state)
    arguments = jax.tree.map(lambda leaf: placed(leaf, PartitionSpec()), steps.arguments)
    batch = jax.tree.map(lambda leaf: placed(leaf, PartitionSpec(AXIS)), steps.batch)
    return steps.train.lower(state, arguments, batch)


def measure(config: Any, parallel: DataParallel, absent: Absent, model: Any = None) -> dict[str, Any]:
    """Compile the step (around `model`, where one is given) and read what the compiler says of it.

    Raises:
      UserError: a device's memory does not hold it.
    """
    steps = step.make_steps(config, parallel, model)
    began = time.perf_counter()
    try:
        compiled = lowered(steps, config, parallel).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"[Uu]sed .*? of .*? hbm[^.]*", str(error))
        raise does_not_fit(config, used[0] if used else "") from None
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    if memory.argument_size_in_bytes + memory.temp_size_in_bytes > absent.memory:  # not every compiler minds
        needs = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
        raise does_not_fit(config, f"it takes {needs:.1f} GB of {absent.memory / 1e9:.1f}")
    cost = absent.cost(compiled)
    at_least = cost["flops_per_step"] / absent.flops, cost["memory_bytes_per_step"] / absent.bandwidth
    collectives = hlo.collectives_of(compiled.as_text())
    params = jax.tree.leaves(steps.state.params)
    return {
        **cost,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "collectives": {name: count for name, (count, _) in collectives.items()},
        "collective_bytes_per_step": sum(size for _, size in collectives.values()),
        "gradient_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in params),
        "roofline_seconds": max(at_least),
        "compile_seconds": seconds,
    }


def does_not_fit(config: Any, why: str) -> cli.UserError:
    """What to say of a batch that is too large."""
    what = f"a batch of {config.data.batch_size} does not fit" + (f" ({why})" if why else "")
    return cli.UserError(what, "take a smaller one, or --remat")


def largest(config: Any, parallel: DataParallel, absent: Absent, record: dict[str, Any], model: Any) -> int:
    """The largest global batch that fits, to 1/32 of it: estimated from one compilation, then tried downwards."""
    count = len(parallel.devices)
    per_image = record["temp_bytes"] / (config.data.batch_size / count)
    each = int((absent.memory - record["argument_bytes"]) / per_image) // 8 * 8
    step_down = max(each // 32 // 8 * 8, 8)
    while each > 0:
        trial = config.copy_and_resolve_references()
        trial.data.batch_size = each * count
        try:
            measure(trial, parallel, absent, model)
        except cli.UserError:
            each -= step_down
        else:
            return each * count
    return 0


def tell(args: argparse.Namespace, absent: Absent, record: dict[str, Any]) -> None:
    """Print the table."""
    images = args.batch_size / len(absent.devices)
    size = f"{args.image_size} px, {images:g} images"
    cli.say(f"{absent.name}: {args.arch}, {size}; {record['precision']}; a {absent.kind}, a step")
    gradients, collective = record["gradient_bytes"], record["collective_bytes_per_step"]
    accessed, memory = record["bytes_per_step"], record["memory_bytes_per_step"]
    rows = {
        "FLOPs": f"{record['flops_per_step'] / 1e12:.2f} T",
        "bytes accessed": f"{amount(accessed)} ({accessed / images / 1e6:.1f} MB an image)",
        "  of its memory": f"{amount(memory)} ({memory / images / 1e6:.1f} MB an image)",
        "temporary memory": amount(record["temp_bytes"]),
        "collective bytes": f"{collective / 1e6:.1f} MB ({collective / gradients:.3f} of the gradients)",
        "collectives": ", ".join(f"{count} {name}" for name, count in record["collectives"].items()) or "none",
    }
    if "kernels" in record:
        rows["kernels"] = f"{record['kernels']} ({record['layout_changes']} turn what a convolution takes or gives)"
    seconds = record["roofline_seconds"]
    rows["roofline"] = f"{seconds * 1e3:.1f} ms ({images / seconds:.0f} images/s)"
    rows["compilation"] = f"{record['compile_seconds']:.0f} s"
    if "largest_batch_size" in record:
        rows["largest batch"] = f"{record['largest_batch_size'] // len(absent.devices)} images a {absent.kind}"
    for name, value in rows.items():
        cli.say(f"{name:17} {value}")


def amount(size: float) -> str:
    """Bytes, for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
