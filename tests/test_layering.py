"""The folders lie on each other in one order, and each imports only from those below it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the lowest up; the modules of one line may import each other. A folder stands for all that is in it.
LAYERS = (
    ("jaxsft.streams", "jaxsft.progress"),
    ("jaxsft.cli",),
    ("jaxsft.patience",),
    ("jaxsft.buckets",),
    ("jaxsft.storage",),
    ("jaxsft.output",),
    ("jaxsft.models",),
    ("jaxsft.data", "jaxsft.interpret", "convert"),
    ("jaxsft.learn", "jaxsft.ship"),
    ("jaxsft.allowed", "jaxsft.keys", "jaxsft.conflicts", "jaxsft.config", "jaxsft.recipes", "jaxsft.flags"),
    ("jaxsft.run", "jaxsft.parity", "jaxsft.data.show"),
    ("jaxsft.tune",),
    ("jaxsft", "jaxsft.bench"),  # the commands
)
FILES = sorted([*ROOT.glob("jaxsft/**/*.py"), *ROOT.glob("convert/**/*.py")])


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> int:
    """The layer of the longest entry that `module` is, or lies in."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for number, layer in enumerate(LAYERS):
            if name in layer:
                return number
    raise AssertionError(f"{module} has no layer")


def imports(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it."""
    modules = {module_of(other) for other in FILES}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("jaxsft", "convert"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in ("jaxsft", "convert"))


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_down(file: Path) -> None:
    module = module_of(file)
    upwards = [name for name in imports(file) if layer_of(name) > layer_of(module)]
    assert not upwards, f"{module} imports from above: {upwards}"


def test_the_wheel_holds_every_folder() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}
    assert sorted(packages) == sorted(folders | {"jaxsft.configs"})
