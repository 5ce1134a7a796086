"""How well each method learns from few labels: the recipes of configs/few_labels.py, over seeds, and PyTorch's."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxsft import cli, output, storage
from jaxsft import config as config_module
from jaxsft.bench import reference, step
from jaxsft.data.sources import open_splits
from jaxsft.flags import parse_flags
from jaxsft.run.log import NotFinite
from jaxsft.run.shared import Shared
from jaxsft.tune.loop import evaluations

Loop = Callable[[ConfigDict], float]  # trains as a config says; the accuracy at the end

RECIPE = "configs/few_labels.py"
METHODS = (
    "scratch", "probe", "full", "lp-ft", "discriminative", "ema", "mixup", "sam", "fixmatch", "combined",
)  # fmt: skip
IN_TORCH = ("scratch", "probe", "full")  # methods that have a loop of PyTorch's
EPOCHS = {25: 20, 250: 5}  # images of a class -> epochs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench methods`."""
    parser.add_argument(
        "--weights", required=True, type=file, help="a state_dict of torchvision's ResNet-18, a .pth file"
    )
    parser.add_argument("--data-dir", default="", help="where TFDS's cifar10 is prepared")
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"), help="of results; default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--per-class", nargs="+", type=int, choices=EPOCHS, default=[*EPOCHS], help="labelled images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--longer", type=step.whole, default=1, help="times as many epochs; default: %(default)s")
    parser.add_argument("--against", nargs="*", choices=["torch"], default=[], help="the same recipes in PyTorch")
    parser.add_argument("overrides", nargs="*", help="after a --: --config.KEY=VALUE ... of each run")


def file(text: str) -> str:
    """Argparse's `type` for a file that is there: the first runs, from scratch, would not miss it."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return text


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train what has not been trained yet by `workdir`, print a table, and return it.

    A run computes what its command does, and leaves its accuracy alone. Those of a method share one compiled program.

    Returns:
      {"methods": {method: {images of a class: {"accuracy": [of each seed], "mean", "command"}}}, "torch": the same}.

    Raises:
      UserError: `workdir` can't be written, or a run can't be done.
      Stop: a loss is not finite.
    """
    found: dict[str, Any] = {"methods": {}, "torch": {}}
    try:
        args.workdir.mkdir(parents=True, exist_ok=True)
        storage.try_to_write(args.workdir)
    except OSError as error:
        raise cli.UserError(f"{args.workdir} can't be written: {error.strerror}", "give another --workdir") from None
    for method in args.methods:
        shared = Shared()
        for seed in args.seeds:
            loops: dict[str, Loop] = {"methods": functools.partial(ours, shared=shared)}
            if args.against and method in IN_TORCH:
                loops["torch"] = reference.accuracy
            for per_class in args.per_class:
                flags = flags_of(args, method, per_class, seed)
                for kind, loop in loops.items():
                    path = args.workdir / f"{kind}-{method}-{per_class}-{args.longer}-{seed}.json"
                    note(found[kind], method, per_class, kept(path, flags, loop), flags)
    for kind, methods in found.items():
        for method, sizes in methods.items():
            for per_class, row in sizes.items():
                values = row["accuracy"]
                row["mean"] = statistics.mean(values)
                cli.say(f"{kind:8} {method:16} {10 * per_class:6} {said(values)}")
    return found


def flags_of(args: argparse.Namespace, method: str, per_class: int, seed: int) -> list[str]:
    """The arguments of `jaxsft.train` for one run."""
    weights = "" if method == "scratch" else args.weights
    return [
        f"--config={RECIPE}:{method}",
        f"--config.model.weights={weights}",
        f"--config.data.data_dir={args.data_dir}",
        f"--config.data.per_class={per_class}",
        f"--config.train.epochs={EPOCHS[per_class] * args.longer}",
        f"--config.seed={seed}",
        *args.overrides,
    ]


def note(rows: dict[str, Any], method: str, per_class: int, accuracy: float, flags: list[str]) -> None:
    """Add the accuracy of a seed to a row."""
    command = f"python -m jaxsft.train {' '.join(flags)}"
    row = rows.setdefault(method, {}).setdefault(per_class, {"accuracy": [], "command": command})
    row["accuracy"].append(accuracy)


def kept(path: Path, flags: list[str], loop: Loop) -> float:
    """The accuracy of a run, from `path` where that has it of the same `flags`; else of `loop`, and put there."""
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("flags") != flags:
        config, _, _ = parse_flags(flags, "", {})
        config_module.check(config)
        record = {"accuracy": loop(config), "flags": flags}
        output.write_json(path, record)
    cli.say(f"{path.stem}: {record['accuracy']:.4f}")
    return float(record["accuracy"])


def ours(config: ConfigDict, shared: Shared) -> float:
    """The accuracy at the end of a run of ours. Raises Stop where a loss is not finite."""
    try:
        return [result.accuracy for result in evaluations(config, open_splits(config), shared)][-1]
    except NotFinite as found:
        raise cli.Stop(str(found), "lower config.optim.lr") from None


def said(values: list[float]) -> str:
    """'64.4 (63.8-65.1)': the mean and the range, in per cent."""
    mean, low, high = (100 * x for x in (statistics.mean(values), min(values), max(values)))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"
