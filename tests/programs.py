"""What programs that JAX compiles say of their products."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

PRODUCT = re.compile(r"stablehlo[.](?:dot_general|convolution)\b.*")


def precisions(program: str) -> set[str]:
    """How the products of a StableHLO program are to be multiplied: of {'DEFAULT', 'HIGH', 'HIGHEST'}."""
    found: set[str] = set()
    for line in PRODUCT.findall(program):
        of_both = re.findall(r"\b(?:DEFAULT|HIGH|HIGHEST)\b", line)
        assert len(of_both) == 2, line
        found.update(of_both)
    return found


@contextlib.contextmanager
def compiled_into(folder: Path) -> Iterator[None]:
    """Write every program that is compiled, as StableHLO, into `folder`."""
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_dump_ir_to", None)
