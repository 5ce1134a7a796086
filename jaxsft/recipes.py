"""Config files: a user's own by their path, and the recipes that ship, by their names."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import traceback
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
from ml_collections import ConfigDict, FrozenConfigDict

from jaxsft import config as config_module
from jaxsft.cli import Stop, UserError, local_path


def load(config_flag: str) -> ConfigDict:
    """The config of FILE[:VARIANT]: what get_config([VARIANT]) of the Python file returns.

    FILE is a path, or names a recipe that ships with this package: cifar10 or configs/cifar10.py.

    Raises:
      UserError: there is no such file, it can't be run, or it returns something else.
    """
    local_path(config_flag)  # for gs://bucket/file.py, before it is cut at its colon
    file, colon, variant = config_flag.partition(":")
    path = find(local_path(file))
    module = run_file(path, "config", near_files(path))
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"the config file {path} defines no get_config", "write it as in configs/cifar10.py")
    with told(path, "config", "get_config", f"leave out the :{variant}" if colon else ""):
        config = module.get_config(*[variant] if colon else [])
    if not isinstance(config, ConfigDict):
        what = f"get_config of {path} returns a {type(config).__name__}"
        raise UserError(what, "let it return what jaxsft.config.default() gave, with changes")
    config = ConfigDict(config) if isinstance(config, FrozenConfigDict) else config
    config_module.check_keys(config)
    return config


def run_file(path: Path, what: str, others: str) -> Any:
    """The module that a Python file of the user's makes.

    Args:
      path: of the file.
      what: kind of file it is, for messages: "config".
      others: what to do where there is none.

    Raises:
      UserError: there is no such file, or it can't be run.
    """
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no {what} file {path}", others) from None
    except OSError as error:
        raise UserError(f"the {what} file {path} can't be read: {error.strerror}", others) from None
    number = zlib.crc32(os.fsencode(os.path.abspath(path)))
    module = types.ModuleType(f"{what}_{number:08x}")  # a file's own: none takes another's place
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for what it defines
    cloudpickle.register_pickle_by_value(module)  # workers can't import it
    with told(path, what):
        exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def told(path: Path, what: str, function: str = "", instead: str = "") -> Iterator[None]:
    """Let an exception from a file of the user's, or a `function` of it, be one line: where, and what; a UserError."""
    try:
        yield
    except Stop:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}", f"mend the {what} file") from None
    except Exception as error:  # the file is a stranger's
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else f"{path}: {function}" if function else str(path)
        hint = f"mend the {what} file" if lines or not instead else instead
        raise UserError(f"{where}: {type(error).__name__}: {error}", hint) from None


def shipped() -> Path:
    """The folder of the recipes that ship: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(filter(Path.is_dir, (package / "configs", package.parent / "configs")))


def find(path: Path) -> Path:
    """`path` itself where a file is there, else the recipe that is called so."""
    recipe = shipped() / f"{path.stem}.py"
    is_name = path.parent in (Path(), Path("configs")) and path.suffix in ("", ".py")
    is_there = path.exists() and not path.is_dir()
    return recipe if is_name and not is_there and recipe.exists() else path


def near_files(path: Path) -> str:
    """A hint for the name of a config file that is not there."""
    ours = [Path("configs", file.name) for file in sorted(shipped().glob("*.py"))]
    files = {file.stem: file for file in [*path.parent.glob("*.py"), *ours]}
    close = difflib.get_close_matches(path.stem, files, n=1)
    if close:
        return f"did you mean {files[close[0]]}?"
    return f"known: {', '.join(map(str, ours))}"


def run_name(config_flag: str) -> str:
    """The default name of a run: configs/cifar10.py:sample -> cifar10-sample."""
    file, _, variant = config_flag.partition(":")
    return Path(file).stem + (f"-{variant}" if variant else "")
