"""One computation said in several ways, for several platforms."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

from jax import lax

KNOWN = ("cpu", "tpu")  # to JAX a GPU's devices have one name, and its programs two, cuda and rocm
# What is traced is for this platform, one of KNOWN; None: it may be for any, as what is exported.
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def by_platform(*arrays: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """`forms[platform](*arrays)`, of platforms such as cpu, tpu and cuda; `default(*arrays)` on all others.

    It is `lax.platform_dependent`; where the platform is known, only its own form is traced, which takes a tenth less
    time.
    """
    known = _platform.get()
    if known is None:
        return lax.platform_dependent(*arrays, default=default, **forms)
    return forms.get(known, default)(*arrays)


def for_platform(body: Callable[..., Any], platform: str) -> Callable[..., Any]:
    """`body`, to be traced for devices of this platform alone."""

    @functools.wraps(body)
    def traced(*args: Any, **kwargs: Any) -> Any:
        token = _platform.set(platform if platform in KNOWN else None)
        try:
            return body(*args, **kwargs)
        finally:
            _platform.reset(token)

    return traced
