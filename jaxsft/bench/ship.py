"""What a run is worth as it leaves: accuracy, size and speed of each of its forms, in turns in one process.

The forms are the run in this program, its weights in PyTorch, and its ONNX files in float32 and in int8 under ONNX
Runtime. All take the same images, uint8, and normalise them; all have every core of the CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsft import cli, export, storage
from jaxsft.bench import step
from jaxsft.data.augment import normalise
from jaxsft.models.precision import with_products
from jaxsft.run import exported
from jaxsft.run.evaluation import open_examples
from jaxsft.run.parallel import cores
from jaxsft.run.saved import Run, load_run

Call = Callable[[np.ndarray], np.ndarray]  # uint8 [B, S, S, 3] -> logits [B, K]

BATCHES = (1, 32)  # images at once: how long one waits, and how many there are in a second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench ship`."""
    parser.add_argument("--workdir", required=True, nargs="+", type=storage.location, help="of runs, such as a student")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: %(default)s")
    parser.add_argument(
        "--calibrate", type=step.whole, default=export.CALIBRATE, help="images for int8; default: %(default)s"
    )
    parser.add_argument("--rounds", type=step.whole, default=7, help="turns of each; default: %(default)s")
    parser.add_argument(
        "--seconds", type=step.above_zero, default=1.0, help="a turn takes about so long; default: %(default)s"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return it.

    Returns:
      "threads", of each form; "rows": for each run and form "workdir", "arch", "form", "bytes" of its file, "accuracy"
      on the run's eval split, and of the medians over the turns "latency_ms" of one image and "images_per_sec" of
      batches of 32.

    Raises:
      UserError: there is no such run, its images can't be had, or a package is missing.
    """
    rows: list[dict[str, Any]] = []
    calls: list[Call] = []
    with tempfile.TemporaryDirectory(prefix="jaxsft-bench-") as folder:
        for number, workdir in enumerate(args.workdir):
            loaded = load_run(workdir, args.checkpoint)
            found = forms(loaded, Path(folder) / str(number), args.calibrate)
            scores = exported.evaluate_programs(
                {name: of_floats(call) for name, (_, call) in found.items()},
                open_examples(loaded),
                loaded.card.multi_label,
            )
            for name, (size, call) in found.items():
                row = {"workdir": str(workdir), "arch": loaded.card.arch, "form": name, "bytes": size}
                rows.append({**row, "accuracy": scores[name].accuracy, "side": loaded.card.preprocessing.crop_size})
                calls.append(call)
    for count in BATCHES:
        seconds = medians(
            [of_noise(call, count, row["side"]) for call, row in zip(calls, rows, strict=True)],
            args.rounds,
            args.seconds,
        )
        for row, each in zip(rows, seconds, strict=True):
            row.update({"latency_ms": 1000 * each} if count == 1 else {"images_per_sec": count / each})
    for row in rows:
        cli.say(
            f"{row['arch']:20} {row['form']:22} accuracy {row['accuracy']:.4f}  {row['bytes'] / 1e6:7.3f} MB"
            f"  {row['latency_ms']:8.2f} ms  {row['images_per_sec']:8.1f} images/s"
        )
    cli.say(f"{cores()} threads each")
    return {"threads": cores(), "rows": rows}


def forms(run: Run, folder: Path, calibrate: int) -> dict[str, tuple[int, Call]]:
    """The forms of a run: the size of the file, which is written below `folder` and removed with it, and the program.

    Raises:
      UserError: a package is missing.
    """
    files = {form: folder / f"run{export.FORMATS[form][0]}" for form in ("safetensors", "torch", "onnx", "int8")}
    for form, file in files.items():
        export.FORMATS[form][1](run, file) if form != "int8" else export.write_int8(run, file, calibrate)
    sizes = {form: file.stat().st_size for form, file in files.items()}
    return {
        "jaxsft float32": (sizes["safetensors"], in_jax(run)),
        "torch float32": (sizes["torch"], in_torch(run, files["torch"])),
        "onnxruntime float32": (sizes["onnx"], onnx_program(files["onnx"])),
        "onnxruntime int8": (sizes["int8"], onnx_program(files["int8"])),
    }


def in_jax(run: Run) -> Call:
    """The run in this program: a batch split over the cores as in evaluation, a single image on all of them."""
    parallel, to = all_devices(run.config), run.card.preprocessing
    axis_name, replicated = parallel.axis_name, parallel.replicate(run.variables)

    def logits(variables: Any, images: jax.Array) -> jax.Array:
        return run.model.apply(variables, normalise(images, to), train=False)

    def part(variables: Any, dataset: Any, batch: Any) -> jax.Array:
        found = logits(variables, batch["image"])
        return found if axis_name is None else jax.lax.all_gather(found, axis_name, tiled=True)

    split, whole = parallel.compile(part), jax.jit(with_products(logits, run.config.train.matmul_precision))

    def call(images: np.ndarray) -> np.ndarray:
        if len(images) % len(parallel.devices):
            return np.asarray(whole(run.variables, images))
        return np.asarray(split(replicated, {}, parallel.split({"image": images})))

    return call
