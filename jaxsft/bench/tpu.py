"""What the train step costs on TPUs that are not here: the real compiler (package libtpu) compiles it for them."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxsft import cli
from jaxsft.bench import step
from jaxsft.bench.plain import plain_model
from jaxsft.models.precision import said
from jaxsft.run.parallel import AXIS, DataParallel


class Chip(NamedTuple):
    """One chip's limits, as its vendor states them."""

    flops: float  # a second, bfloat16
    bandwidth: float  # bytes a second, of its memory
    memory: float  # bytes


CHIPS = {
    "v4": Chip(275e12, 1228e9, 32 * 2**30),
    "v5e": Chip(197e12, 819e9, 16 * 2**30),
    "v5p": Chip(459e12, 2765e9, 95 * 2**30),
    "v6e": Chip(918e12, 1640e9, 32 * 2**30),
}
# libtpu asks these of the machine it believes to be on; the topology that is compiled for is another matter.
PRETENDED = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # A TPU admits one process, and libtpu keeps others out by a lock file. To compile takes no TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench tpu`."""
    step.add_arguments(parser, arch="resnet50", batch_size=512, precision="bfloat16")
    parser.add_argument("--topology", default="v5e:2x2", help="CHIP:SHAPE, such as v5e:16x16; default: %(default)s")
    parser.add_argument("--plain", action="store_true", help="the network written from Flax's own layers instead")
    parser.add_argument("--largest", action="store_true", help="find the largest batch a chip holds; compiles it too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile, print a table, and return it.

    Returns:
      A chip's "flops_per_step", "bytes_per_step" (of its memory, read and written), "temp_bytes",
      "collective_bytes_per_step" and "collectives" (their number by kind), "gradient_bytes", "roofline_seconds" (the
      larger of FLOPs and bytes over the chip's rates), "compile_seconds", and "largest_batch_size" of all chips;
      and the "precision" of the numbers, for people.

    Raises:
      UserError: no libtpu, a topology that does not exist, a batch that does not split or does not fit.
    """
    chip = CHIPS.get(args.topology.partition(":")[0])
    if chip is None:
        what = f"--topology is {args.topology!r}"
        raise cli.UserError(what, f"it must be one of {', '.join(CHIPS)}, a colon and a shape, such as v5e:2x2")
    if importlib.util.find_spec("libtpu") is None:
        raise step.missing("libtpu", "tpu")
    config = step.config_of(args)
    parallel = DataParallel(
        config.parallel.backend, topology(args.topology), matmul_precision=config.train.matmul_precision
    )
    model = plain_model(args.arch, step.CLASSES, jnp.dtype(args.precision)) if args.plain else None
    record = measure(config, parallel, chip, model)
    record["precision"] = said(args.precision, args.matmul_precision, parallel.devices)
    if args.largest:
        record["largest_batch_size"] = largest(config, parallel, chip, record, model)
    tell(args, len(parallel.devices), record)
    return record


def topology(name: str) -> list[Any]:
    """The devices of a TPU slice that is not there.

    Raises:
      UserError: there is no such slice.
    """
    from jax.experimental import topologies

    for key, value in PRETENDED.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        raise cli.UserError(f"--topology is {name!r}: {error}", "name a slice such as v5e:2x2 or v5e:16x16") from None


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


def measure(config: Any, parallel: DataParallel, chip: Chip, model: Any = None) -> dict[str, Any]:
    """Compile the step (around `model`, where one is given) and read what the compiler says of it.

    Raises:
      UserError: a chip's memory does not hold it.
    """
    steps = step.make_steps(config, parallel, model)
    began = time.perf_counter()
    try:
        compiled = lowered(steps, config, parallel).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = re.search(r"[Uu]sed .*? of .*? hbm[^.]*", str(error))
        what = f"a batch of {config.data.batch_size} does not fit" + (f" ({said[0]})" if said else "")
        raise cli.UserError(what, "take a smaller one, or --remat") from None
    seconds = time.perf_counter() - began
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    collectives = collectives_of(compiled.as_text())
    params = jax.tree.leaves(steps.state.params)
    return {
        "flops_per_step": cost["flops"],
        "bytes_per_step": cost["bytes accessed"],
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "collectives": {name: count for name, (count, _) in collectives.items()},
        "collective_bytes_per_step": sum(size for _, size in collectives.values()),
        "gradient_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in params),
        "roofline_seconds": max(cost["flops"] / chip.flops, cost["bytes accessed"] / chip.bandwidth),
        "compile_seconds": seconds,
    }


def collectives_of(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results)} of a compiled program's HLO text."""
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            size = sum(
                math.prod(map(int, filter(None, shape.split(",")))) * bytes_of(kind)
                for kind, shape in ARRAY.findall(match["result"])
            )
            count, total = found.get(match["name"], (0, 0))
            found[match["name"]] = count + 1, total + size
    return found


def bytes_of(kind: str) -> int:
    """The size of an HLO type such as f32, bf16, s8 or pred."""
    bits = re.search(r"\d+", kind)
    return max(int(bits[0]) // 8, 1) if bits else 1


def largest(config: Any, parallel: DataParallel, chip: Chip, record: dict[str, Any], model: Any) -> int:
    """The largest global batch that fits, to 1/32 of it: estimated from one compilation, then tried downwards."""
    chips = len(parallel.devices)
    per_image = record["temp_bytes"] / (config.data.batch_size / chips)
    a_chip = int((chip.memory - record["argument_bytes"]) / per_image) // 8 * 8
    step_down = max(a_chip // 32 // 8 * 8, 8)
    while a_chip > 0:
        trial = config.copy_and_resolve_references()
        trial.data.batch_size = a_chip * chips
        try:
            measure(trial, parallel, chip, model)
        except cli.UserError:
            a_chip -= step_down
        else:
            return a_chip * chips
    return 0


def tell(args: argparse.Namespace, chips: int, record: dict[str, Any]) -> None:
    """Print the table."""
    images = args.batch_size / chips
    size = f"{args.image_size} px, {images:g} images"
    cli.say(f"{args.topology}: {args.arch}, {size}; {record['precision']}; a chip, a step")
    gradients, collective = record["gradient_bytes"], record["collective_bytes_per_step"]
    rows = {
        "FLOPs": f"{record['flops_per_step'] / 1e12:.2f} T",
        "bytes accessed": f"{record['bytes_per_step'] / 1e9:.1f} GB",
        "  an image": f"{record['bytes_per_step'] / images / 1e6:.0f} MB",
        "temporary memory": f"{record['temp_bytes'] / 1e9:.2f} GB",
        "collective bytes": f"{collective / 1e6:.1f} MB ({collective / gradients:.3f} of the gradients)",
        "collectives": ", ".join(f"{count} {name}" for name, count in record["collectives"].items()) or "none",
        "roofline": f"{record['roofline_seconds'] * 1e3:.1f} ms ({images / record['roofline_seconds']:.0f} images/s)",
        "compilation": f"{record['compile_seconds']:.0f} s",
    }
    if "largest_batch_size" in record:
        rows["largest batch"] = f"{record['largest_batch_size'] // chips} images a chip"
    for name, value in rows.items():
        cli.say(f"{name:17} {value}")
