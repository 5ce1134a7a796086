"""A whole job: from the command to its result, against the plain PyTorch script of the same recipe and accuracy.

    python -m jaxsft.bench job --work cifar|photos --weights FILE.pth [--against torch]

Every command is a process of its own, one after the other: ours with an empty cache of compiled programs, the same
again, with another learning rate, and PyTorch's. `cifar` is a ResNet-18 on 2,500 real CIFAR-10 images at 64 px for
5 epochs, evaluated on all 10,000 test images; `photos` the same network on 600 photographs in folders, a tenth of them
held out, at 224 px for 3 epochs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft import config as config_module
from jaxsft.bench import reference, step
from jaxsft.bench.data import write_folder
from jaxsft.data.sources import open_splits
from jaxsft.flags import parse_flags
from jaxsft.run import log

WORKS: Mapping[str, tuple[str, ...]] = {
    "cifar": (
        "--config=configs/few_labels.py:full",
        "--config.data.per_class=250",
        "--config.train.epochs=5",
        "--config.eval.every_epochs=5",
    ),
    "photos": (
        "--config=configs/folder.py",
        "--config.train.method=full",
        "--config.data.preset=config",
        "--config.train.epochs=3",
        "--config.eval.every_epochs=3",
        "--config.optim.warmup_epochs=0.5",
    ),
}
PHOTOS, HELD_OUT = 600, 10  # of them one in so many
STAGES = ("start-up", "first step", "epochs", "evaluation", "rest")
SCRIPT = Path(__file__).with_name("torch_script.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench job`."""
    parser.add_argument("--work", choices=WORKS, default="cifar", help="default: %(default)s")
    parser.add_argument("--weights", default="", help="a state_dict of torchvision's ResNet-18, a .pth file; '': none")
    parser.add_argument("--data-dir", default="", help="where TFDS's cifar10 is prepared")
    parser.add_argument("--against", choices=["torch"], help="the same recipe as a plain PyTorch script")
    parser.add_argument("--rounds", type=step.whole, default=3, help="of all commands; the median counts")
    parser.add_argument("overrides", nargs="*", help="after a --: --config.KEY=VALUE ... of jaxsft.train")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return it.

    Returns:
      Of "cold", "again", "another rate" and, with `--against`, "torch": "seconds" (the median), "stages" (medians of
      STAGES, in seconds) and "accuracy"; "ratio": of torch's seconds to those of the first two; and
      "another_rate_ratio", of "another rate" to "again".

    Raises:
      UserError: a command failed.
    """
    with tempfile.TemporaryDirectory(prefix="jaxsft-bench-") as name:
        place = Path(name)
        flags = [*WORKS[args.work], f"--config.model.weights={args.weights}", *args.overrides]
        if args.work == "photos":
            write_photos(place / "photos")
            flags.append(f"--config.data.source=folder:{place / 'photos'}")
        elif args.data_dir:
            flags.append(f"--config.data.data_dir={args.data_dir}")
        config, _, _ = parse_flags(flags, "", {})
        config_module.check(config)
        recipe = write_recipe(config, place) if args.against else None
        found: dict[str, list[dict[str, Any]]] = {}
        for turn in range(args.rounds):
            cache = place / f"cache{turn}"
            other = [f"--config.optim.lr={config.optim.lr / 2}"]
            for kind, more in (("cold", []), ("again", []), ("another rate", other)):
                workdir = place / f"{turn}-{kind.split()[0]}"
                found.setdefault(kind, []).append(ours([*flags, *more], workdir, cache))
            if recipe is not None:
                found.setdefault("torch", []).append(torchs(recipe))
    return told(args, {kind: summary(turns) for kind, turns in found.items()})


def told(args: argparse.Namespace, record: dict[str, Any]) -> dict[str, Any]:
    """The record with its ratios, printed."""
    cli.say(f"{args.work:14}{'seconds':>9}" + "".join(f"{name:>12}" for name in STAGES) + "    accuracy")
    for kind, row in record.items():
        stages = "".join(f"{row['stages'][name]:12.1f}" for name in STAGES)
        cli.say(f"{kind:14}{row['seconds']:9.1f}{stages}{row['accuracy']:12.4f}")
    if "torch" in record:
        seconds = record["torch"]["seconds"]
        record["ratio"] = {kind: seconds / record[kind]["seconds"] for kind in ("cold", "again")}
        cli.say(f"PyTorch's time by ours: cold {record['ratio']['cold']:.2f}, again {record['ratio']['again']:.2f}")
    record["another_rate_ratio"] = record["another rate"]["seconds"] / record["again"]["seconds"]
    cli.say(f"another rate by the same again: {record['another_rate_ratio']:.2f}")
    return record


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a command's turns."""
    stages = {name: statistics.median(turn["stages"][name] for turn in turns) for name in STAGES}
    seconds = statistics.median(turn["seconds"] for turn in turns)
    return {"seconds": seconds, "stages": stages, "accuracy": statistics.median(turn["accuracy"] for turn in turns)}


def ours(flags: list[str], workdir: Path, cache: Path) -> dict[str, Any]:
    """One run of our command, with that folder as its cache."""
    command = [sys.executable, "-m", "jaxsft.train", *flags, f"--workdir={workdir}"]
    began, lines, ended = timed(command, {"JAXSFT_CACHE": str(cache)})
    at = {text.split()[0]: when for when, text in lines if text.startswith(("compiling", "compiled"))}
    records = log.records(workdir)
    last = {record["split"]: record for record in records}
    marks = [began, at["compiling"], at["compiled"], last["train"]["time"], last["eval"]["time"], ended]
    return of_marks(marks, last["eval"]["accuracy"])


def torchs(recipe: Path) -> dict[str, Any]:
    """One run of PyTorch's script."""
    began, lines, ended = timed([sys.executable, str(SCRIPT), str(recipe)], {})
    stages = [json.loads(text) for _, text in lines if text.startswith("{")]
    return of_marks([began, *(stage["time"] for stage in stages[:4]), ended], stages[-1]["accuracy"])


def of_marks(marks: list[float], accuracy: float) -> dict[str, Any]:
    """What is said of a run from the times at which it began and each stage ended."""
    spent = [after - before for before, after in itertools.pairwise(marks)]
    return {"seconds": marks[-1] - marks[0], "stages": dict(zip(STAGES, spent, strict=True)), "accuracy": accuracy}


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, list[tuple[float, str]], float]:
    """When a command began, each line of its stdout with its time, and when it ended; of time.time().

    Raises:
      UserError: it failed.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.time()
        with subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process:
            assert process.stdout is not None
            lines = [(time.time(), line.rstrip("\n")) for line in process.stdout]
        ended = time.time()
        if process.returncode:
            said.seek(0)
            raise cli.UserError(f"{' '.join(command)} failed: {said.read().strip()[-300:]}", "mend that")
    return began, lines, ended


def write_photos(folder: Path) -> None:
    """PHOTOS photographs, in train/CLASS and val/CLASS."""
    write_folder(folder / "all", 2 * PHOTOS)  # half of them are small images
    for number, path in enumerate(sorted((folder / "all").glob("*/*.jpg"))):
        if int(path.stem) % 2:
            split = "train" if number // 2 % HELD_OUT else "val"
            to = folder / split / path.parent.name / path.name
            to.parent.mkdir(parents=True, exist_ok=True)
            path.rename(to)
        else:
            path.unlink()
    for left in (folder / "all").iterdir():
        left.rmdir()
    (folder / "all").rmdir()


def write_recipe(config: ConfigDict, place: Path) -> Path:
    """What PyTorch's script reads: the recipe, and the images of a set that is held in memory as an array."""
    train, evaluated = open_splits(config)
    data = {key: value for key, value in config.data.to_dict().items() if isinstance(value, int | float | str | tuple)}
    data |= {"folder": "", "arrays": "", "workers": 2}
    if config.data.source.startswith("folder:"):
        data["folder"] = config.data.source.partition(":")[2]
    else:
        arrays = place / "arrays.npz"
        data["arrays"] = str(arrays)
        images = {"images": train.images, "eval_images": evaluated.images}  # type: ignore[attr-defined]
        np.savez(arrays, **images, labels=train.labels, eval_labels=evaluated.labels)
    recipe = {
        "arch": config.model.arch,
        "weights": config.model.weights,
        "seed": config.seed,
        "smoothing": config.train.label_smoothing,
        "rates": reference.rates_of(config, len(train)),
        "settings": reference.settings_of(config),
        "data": data,
        "out": str(place / "tuned.pth"),
    }
    path = place / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path
