"""What the train step costs on GPUs that are not here: XLA's own compiler (jax's CUDA plugin) compiles it for them.

It needs neither driver nor card. Bytes are counted from its schedule, kernel by kernel (`hlo.py`). What only a card
could tell is not in them: which algorithms and workspaces cuDNN chooses, how products are tiled, and any time.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any, NamedTuple

import jax

from jaxsft import cli
from jaxsft.bench import absent, hlo, step


class Card(NamedTuple):
    """One card as its vendor states it; rates are those of dense products."""

    name: str
    capability: tuple[int, int]
    bfloat16: float  # FLOPs a second
    tf32: float
    float32: float
    bandwidth: float  # bytes a second, of its memory
    l2: int  # bytes of cache
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    shared: int  # bytes of shared memory of each, of which a block can have all but 1 KiB
    clock: float  # GHz
    memory: int = 79 * 2**30  # bytes, of its 80 GB what CUDA gives out


KIB, MIB = 2**10, 2**20
CARDS = {
    "h100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 989e12, 494e12, 67e12, 3352e9, 50 * MIB, 132, 128, 228 * KIB, clock=1.98
    ),
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 312e12, 156e12, 19.5e12, 2039e9, 40 * MIB, 108, 64, 164 * KIB, clock=1.41
    ),
}
# XLA's GpuTargetConfigProto in text form. What is not the card's own is the same since Volta; cuDNN and CUDA are those
# that jax 0.10 is built against.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {optin} shared_memory_per_core: {card.shared}
  core_count: {card.cores} fpus_per_core: {card.lanes} clock_rate_ghz: {card.clock}
  memory_bandwidth: {card.bandwidth:.0f} device_memory_size: {card.memory} l2_cache_size: {card.l2}
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} }}
}}
platform_name: "CUDA" device_description_str: "{card.name}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench gpu`."""
    absent.add_arguments(parser, batch_size=128)
    parser.add_argument("--gpu", default="h100", choices=list(CARDS), help="default: %(default)s")
    parser.add_argument("--cards", type=step.whole, default=1, help="of one machine; default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`absent.run` of the cards, with the number of "kernels" of a step and of "layout_changes" among them.

    Raises:
      UserError: no CUDA plugin, or a batch that does not split or does not fit.
    """
    card = CARDS[args.gpu]
    rate = card.bfloat16
    if args.precision == "float32":
        rate = card.float32 if args.matmul_precision == "highest" else card.tf32
    name = f"{args.cards} x {card.name}"
    devices = topology(card, args.cards)
    return absent.run(args, absent.Absent(name, "card", devices, rate, card.bandwidth, card.memory, cost))


def topology(card: Card, count: int) -> list[Any]:
    """The cards of a machine that is not there.

    Raises:
      UserError: jax's CUDA plugin is not installed, or is not this jax's.
    """
    version = jax.__version__
    to_do = f"pip install jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}, which need no driver"
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise cli.UserError("jax-cuda12-plugin is not installed", to_do)
    target = TARGET.format(card=card, optin=card.shared - 1024)
    try:
        return absent.topology("cuda", target_config=target, topology=f"1x1x{count}")
    except Exception as error:
        raise cli.UserError(f"jax's CUDA plugin does not compile: {error}", to_do) from None


def cost(compiled: Any) -> dict[str, float]:
    """What the schedule of a compiled step says; XLA:GPU itself counts nothing."""
    found = hlo.counts(compiled.as_text())
    return {
        "flops_per_step": found.flops,
        "bytes_per_step": found.bytes,
        "memory_bytes_per_step": found.bytes,
        "kernels": found.kernels,
        "layout_changes": found.layout_changes,
    }
