"""Fine-tune a torchvision model in JAX and prove that it computes what PyTorch computes.

    import jaxsft
    config = jaxsft.recipe("cifar10:sample")
    run = jaxsft.finetune(config, workdir="runs/a")
    run.evaluate(), run.predict("images"), run.mistakes(20), run.export("tuned.pth")
    run = jaxsft.load("runs/a")

`import jaxsft` itself imports nothing; what these names need comes when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsft.cli import Stop, UserError
    from jaxsft.data.sources import register as register_source
    from jaxsft.interface import Run, finetune, load, port, recipe

__version__ = "0.1.0"
__all__ = ["Run", "Stop", "UserError", "finetune", "load", "port", "recipe", "register_source"]

HOMES = {
    **dict.fromkeys(("Run", "finetune", "load", "port", "recipe"), ("jaxsft.interface", "")),
    **dict.fromkeys(("Stop", "UserError"), ("jaxsft.cli", "")),
    "register_source": ("jaxsft.data.sources", "register"),
}  # name -> the module that it comes from, and its name there where it has another


def __getattr__(name: str) -> Any:
    """A public name, when it is first used."""
    if name not in HOMES:
        raise AttributeError(f"module 'jaxsft' has no attribute {name!r}")
    module, other = HOMES[name]
    globals()[name] = value = getattr(importlib.import_module(module), other or name)
    return value


def __dir__() -> list[str]:
    """The public names, without those of this file's own."""
    return [*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"]
