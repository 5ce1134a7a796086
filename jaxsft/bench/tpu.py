"""What the train step costs on TPUs that are not here: the real compiler (package libtpu) compiles it for them."""

from __future__ import annotations

import argparse
import importlib.util
import os
from typing import Any, NamedTuple

from jaxsft import cli
from jaxsft.bench import absent, hlo, step


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench tpu`."""
    absent.add_arguments(parser, batch_size=512)
    parser.add_argument("--topology", default="v5e:2x2", help="CHIP:SHAPE, such as v5e:16x16; default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`absent.run` of the chips of --topology.

    Raises:
      UserError: no libtpu, a topology that does not exist, a batch that does not split or does not fit.
    """
    chip = CHIPS.get(args.topology.partition(":")[0])
    if chip is None:
        what = f"--topology is {args.topology!r}"
        raise cli.UserError(what, f"it must be one of {', '.join(CHIPS)}, a colon and a shape, such as v5e:2x2")
    if importlib.util.find_spec("libtpu") is None:
        raise step.missing("libtpu", "tpu")
    return absent.run(args, absent.Absent(args.topology, "chip", topology(args.topology), *chip, cost))


def topology(name: str) -> list[Any]:
    """The devices of a TPU slice that is not there.

    Raises:
      UserError: there is no such slice.
    """
    for key, value in PRETENDED.items():
        os.environ.setdefault(key, value)
    try:
        return absent.topology("tpu", topology_name=name)
    except Exception as error:
        raise cli.UserError(f"--topology is {name!r}: {error}", "name a slice such as v5e:2x2 or v5e:16x16") from None


def cost(compiled: Any) -> dict[str, float]:
    """What libtpu counts of a compiled step, and what its schedule moves between the chip's memory and its cores.

    libtpu's "bytes accessed" are also those of the cores' inner memory, and of copies into it.
    """
    found = compiled.cost_analysis()
    found = found[0] if isinstance(found, list) else found
    return {
        "flops_per_step": found["flops"],
        "bytes_per_step": found["bytes accessed"],
        "memory_bytes_per_step": hlo.counts(hlo.in_main_memory(compiled.as_text())).bytes,
    }
