"""How well each method learns from few labels: the recipes of configs/few_labels.py, over seeds, and PyTorch's."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxsft import cli
from jaxsft import config as config_module
from jaxsft.bench import reference
from jaxsft.bench.step import whole
from jaxsft.flags import parse_flags
from jaxsft.run.workdir import final_record

RECIPE = "configs/few_labels.py"
METHODS = ("scratch", "probe", "full", "lp-ft", "discriminative", "ema", "mixup", "sam", "fixmatch")
IN_TORCH = ("scratch", "probe", "full")  # methods that have a loop of PyTorch's
EPOCHS = {25: 20, 250: 5}  # images of a class -> epochs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench methods`."""
    parser.add_argument("--weights", required=True, help="a state_dict of torchvision's ResNet-18, a .pth file")
    parser.add_argument("--data-dir", default="", help="where TFDS's cifar10 is prepared")
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"), help="of the runs; default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--per-class", nargs="+", type=int, choices=EPOCHS, default=[*EPOCHS], help="labelled images")
    parser.add_argument("--seeds", type=whole, default=3, help="how many; default: %(default)s")
    parser.add_argument("--against", nargs="*", choices=["torch"], default=[], help="the same recipes in PyTorch")
    parser.add_argument("overrides", nargs="*", help="after a --: --config.KEY=VALUE ... of each run")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train what has not been trained in `workdir` yet, each run a command of its own; print a table, and return it.

    Returns:
      {"methods": {method: {images of a class: {"accuracy": [of each seed], "mean", "command"}}}, "torch": the same}.

    Raises:
      UserError: a run that can't be done.
    """
    found: dict[str, Any] = {"methods": {}, "torch": {}}
    for per_class in args.per_class:
        for seed in range(args.seeds):
            for method in args.methods:
                flags = flags_of(args, method, per_class, seed)
                note(found["methods"], method, per_class, trained(args, flags, f"{method}-{per_class}-{seed}"), flags)
                if args.against and method in IN_TORCH:
                    note(found["torch"], method, per_class, in_torch(args, flags, method, per_class, seed), flags)
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
        f"--config.train.epochs={EPOCHS[per_class]}",
        f"--config.seed={seed}",
        *args.overrides,
    ]


def note(rows: dict[str, Any], method: str, per_class: int, accuracy: float, flags: list[str]) -> None:
    """Add the accuracy of a seed to a row."""
    command = f"python -m jaxsft.train {' '.join(flags)}"
    row = rows.setdefault(method, {}).setdefault(per_class, {"accuracy": [], "command": command})
    row["accuracy"].append(accuracy)


def trained(args: argparse.Namespace, flags: list[str], name: str) -> float:
    """The accuracy of a run, which is trained where it is not finished."""
    workdir = args.workdir / name
    if not final_record(workdir):
        command = [sys.executable, "-m", "jaxsft.train", *flags, f"--workdir={workdir}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise cli.UserError(f"{name} ended with {done.returncode}: {done.stderr.strip()[-300:]}", "mend that")
    record = final_record(workdir)
    assert record is not None
    cli.say(f"{name}: {record['accuracy']:.4f}")
    return float(record["accuracy"])


def in_torch(args: argparse.Namespace, flags: list[str], method: str, per_class: int, seed: int) -> float:
    """The accuracy of PyTorch's loop, kept in `workdir`."""
    kept = args.workdir / f"torch-{method}-{per_class}-{seed}.json"
    if not kept.exists():
        config, _, _ = parse_flags(flags, "", {})
        config_module.check(config)
        accuracy = reference.accuracy(config, config.model.weights)
        kept.write_text(json.dumps({"accuracy": accuracy}))
    accuracy = json.loads(kept.read_text())["accuracy"]
    cli.say(f"{kept.stem}: {accuracy:.4f}")
    return float(accuracy)


def said(values: list[float]) -> str:
    """'64.4 (63.8-65.1)': the mean and the range, in per cent."""
    mean, low, high = (100 * x for x in (statistics.mean(values), min(values), max(values)))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"
