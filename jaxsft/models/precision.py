"""The numbers that a network is computed in, on the devices that there are: of its activations, and of its products.

A TPU multiplies bfloat16, and a GPU since NVIDIA's Ampere (compute capability 8.0) TF32, with 8 and 11 of the 24 bits
of float32. Unless told otherwise JAX lets them do so with float32 too; on a TPU, several passes keep more of the bits
(`jax.lax.Precision`). A CPU multiplies float32 in full, whatever it is told.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

AUTO, DEFAULT = "auto", "default"
JAXS_OWN = "jax_default_matmul_precision"  # what a user may have set, in the environment or around us
AMPERE = 8.0  # compute capability, from which on a GPU has both bfloat16 and TF32
AMD = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # architectures with bfloat16, CDNA and RDNA 3
UP_TO = "; up to step"
PASSES = {"default": "1 bfloat16 pass", "high": "3 bfloat16 passes", "highest": "6 bfloat16 passes"}


def resolved_precision(precision: str, devices: Sequence[Any]) -> str:
    """What `precision`, a value of train.precision, is on `devices`: 'float32', 'bfloat16' or 'float16'.

    'auto' is bfloat16 where each of them multiplies it, as TPUs and newer GPUs do, else float32. `devices` are JAX's,
    of all processes, so that all say the same.
    """
    if precision != AUTO:
        return precision
    return "bfloat16" if all(map(has_bfloat16, devices)) else "float32"


def has_bfloat16(device: Any) -> bool:
    """Whether a device has instructions for products of bfloat16 that are faster than float32's."""
    if device.platform in ("tpu", "cpu"):
        return device.platform == "tpu"
    return is_ampere(device) or capability(device).startswith(AMD)


def is_ampere(device: Any) -> bool:
    """Whether a device is a GPU of NVIDIA's of that generation, or a later one."""
    return bool(re.fullmatch(r"\d+[.]\d+", capability(device))) and float(capability(device)) >= AMPERE


def capability(device: Any) -> str:
    """'8.0' and so on of NVIDIA's GPUs, 'gfx90a' and so on of AMD's, '' of what is no GPU."""
    return str(getattr(device, "compute_capability", ""))


def with_products(body: Callable[..., Any], matmul_precision: str) -> Callable[..., Any]:
    """`body`, to be traced, whose float32 products are as train.matmul_precision says; 'default' leaves them JAX's.

    A product that asks for a precision of its own, as resizing does, keeps it.
    """
    if matmul_precision == DEFAULT:
        return body

    @functools.wraps(body)
    def multiplied(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(matmul_precision):
            return body(*args, **kwargs)

    return multiplied


def said(precision: str, matmul_precision: str, devices: Sequence[Any]) -> str:
    """What a run computes in, for people: 'bfloat16 (auto), float32 products in 1 bfloat16 pass (default)'."""
    resolved = resolved_precision(precision, devices)
    name = f"{resolved} ({AUTO})" if precision == AUTO else resolved
    name += " with a scaled loss" if resolved == "float16" else ""
    return f"{name}, {'' if resolved == 'float32' else 'float32 '}products {products(matmul_precision, devices[0])}"


def products(matmul_precision: str, device: Any) -> str:
    """How float32 is multiplied on a device, as in 'in TF32 (default)'."""
    if device.platform == "cpu":
        return "in full"
    chosen = matmul_precision if matmul_precision != DEFAULT else getattr(jax.config, JAXS_OWN) or DEFAULT
    try:
        level = lax.Precision(chosen).name.lower()
    except ValueError:  # an algorithm
        return f"by {chosen}"
    if device.platform == "tpu":
        return f"in {PASSES[level]} ({chosen})"
    if level == "highest" or not has_bfloat16(device):
        return f"in full ({chosen})"
    return f"in TF32{'' if is_ampere(device) else ' where the GPU has it'} ({chosen})"


def continued(before: str, now: str, step: int) -> str:
    """What a run is computed in, for people, that was computed in `before` up to `step` and goes on in `now`."""
    return before if before.partition(UP_TO)[0] == now else f"{now}{UP_TO} {step} {before}"
