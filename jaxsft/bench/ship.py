"""What a run is worth as it leaves: accuracy, size and speed of each of its forms, in turns, in processes of their own.

The forms are the run in this program, its weights in PyTorch, and its ONNX files in float32 and in int8 under ONNX
Runtime. All take the same pictures, uint8, and normalise them; all have a thread for each core of the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from convert import checkpoints, files, names
from convert.reference import torch_network
from jaxsft import cli, storage
from jaxsft.bench import apart, step
from jaxsft.data.augment import normalise
from jaxsft.data.threads import cores
from jaxsft.models.precision import with_products
from jaxsft.models.weights import ModelCard
from jaxsft.run import exported, quantised
from jaxsft.run.evaluation import open_examples
from jaxsft.run.machine import keep_compilations
from jaxsft.run.parallel import all_devices
from jaxsft.run.saved import Run, load_run
from jaxsft.ship import runtime
from jaxsft.storage import Location

Call = Callable[[np.ndarray], np.ndarray]  # uint8 [B, S, S, 3] -> logits [B, K]
ONE, MANY = 1, 32  # images at once: how long one waits, and how many come in a second


class Form(NamedTuple):
    """One of the forms of a run."""

    size: int  # bytes of its file
    make: tuple[Any, ...]  # a function and its arguments, which give a Call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench ship`."""
    parser.add_argument(
        "--workdir", required=True, nargs="+", type=storage.location, help="of one run or several, such as a student"
    )
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: %(default)s")
    parser.add_argument(
        "--calibrate", type=step.whole, default=quantised.CALIBRATE, help="images for int8; default: %(default)s"
    )
    parser.add_argument(
        "--rounds", type=step.whole, default=7, help="turns of each; the median counts; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=step.above_zero, default=1.0, help="a turn takes about so long; default: %(default)s"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return it.

    Returns:
      "threads" of each form, and "rows", one a run and form: "workdir", "arch", "image_size" px, "form", "bytes" of its
      file, "accuracy" on all of the run's eval split, and in the median over the turns "latency_ms" of one image and
      "images_per_sec" of 32 at once.

    Raises:
      UserError: there is no such run, its images can't be had, or a package is missing.
    """
    rows: list[dict[str, Any]] = []
    calls: list[apart.Contestant] = []
    with contextlib.ExitStack() as stack:
        for workdir in args.workdir:
            one = load_run(workdir, args.checkpoint)
            made = forms(one, args.calibrate)
            called = stack.enter_context(apart.contestants({name: form.make for name, form in made.items()}))
            programs = {name: functools.partial(of_levels, call) for name, call in called.items()}
            scores = exported.evaluate_programs(programs, open_examples(one), one.card.multi_label)
            about = {"workdir": str(workdir), "arch": one.card.arch, "image_size": one.card.preprocessing.crop_size}
            for name, form in made.items():
                rows.append({**about, "form": name, "bytes": form.size, "accuracy": scores[name].accuracy})
            calls += called.values()
        for count in (ONE, MANY):
            turns = {i: (calls[i], (noise(count, row["image_size"]),)) for i, row in enumerate(rows)}
            for i, seconds in apart.medians(turns, args.rounds, args.seconds).items():
                rows[i].update({"latency_ms": 1000 * seconds} if count == ONE else {"images_per_sec": count / seconds})
    for row in rows:
        cli.say(said(row))
    cli.say(f"threads: {cores()} of each; latency of {ONE} image, images/s of {MANY} at once")
    return {"threads": cores(), "rows": rows}


def said(row: dict[str, Any]) -> str:
    """A row for people."""
    size, speed = f"{row['bytes'] / 1e6:.2f} MB", f"{row['latency_ms']:.2f} ms {row['images_per_sec']:9.1f} images/s"
    return f"{row['arch']:20} {row['form']:20} accuracy {row['accuracy']:.4f} {size:>10} {speed:>30}"


def forms(one: Run, calibrate: int) -> dict[str, Form]:
    """The forms of a run, with the sizes of what `jaxsft.export` writes. Raises UserError: a package is missing."""
    files.import_torch()
    tensors = names.to_torch(one.variables, one.card.arch)
    onnx = quantised.onnx_files(one, inside=True, calibrate=calibrate)
    return {
        "jaxsft float32": Form(size(tensors, ".safetensors"), (in_jax, one.workdir, str(one.step))),
        "torch float32": Form(size(tensors, ".pth"), (in_torch, one.card, tensors)),
        "onnxruntime float32": Form(len(onnx.floats), (runtime.program, onnx.floats)),
        "onnxruntime int8": Form(len(onnx.int8), (runtime.program, onnx.int8)),
    }


def size(tensors: dict[str, np.ndarray], ending: str) -> int:
    """Bytes of a file of weights."""
    with tempfile.TemporaryDirectory(prefix="jaxsft-") as folder:
        file = Path(folder) / f"weights{ending}"
        checkpoints.write(file, tensors)
        return file.stat().st_size


def in_jax(workdir: Location, checkpoint: str) -> Call:
    """A run in this program: a batch is split over the cores, as in evaluation; one image is computed by all."""
    keep_compilations()
    one = load_run(workdir, checkpoint)
    parallel, to = all_devices(one.config), one.card.preprocessing
    replicated = parallel.replicate(one.variables)

    def logits(variables: Any, images: jax.Array) -> jax.Array:
        return one.model.apply(variables, normalise(images, to), train=False)

    def part(variables: Any, dataset: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return logits(variables, batch["image"])

    split = parallel.compile(part, rows=True)
    whole = jax.jit(with_products(logits, one.config.train.matmul_precision))

    def call(images: np.ndarray) -> np.ndarray:
        if len(images) % len(parallel.devices):
            return np.asarray(whole(one.variables, images))
        return parallel.join(split(replicated, {}, parallel.split({"image": images})))

    return call


def in_torch(card: ModelCard, tensors: dict[str, np.ndarray]) -> Call:
    """torch's network of a run's weights, eager, in channels_last, the better of its layouts on a CPU.

    Raises:
      UserError: torch is missing, or has no such network.
    """
    torch = files.import_torch()
    torch.set_num_threads(cores())
    to = card.preprocessing
    network = torch_network(card.arch, card.num_classes, to.crop_size)
    network.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}, strict=True)
    network = network.eval().to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (to.mean, to.std))

    def call(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()

    return call


def of_levels(call: Call, images: np.ndarray) -> np.ndarray:
    """`call` of images float32 in 0..255."""
    return call(quantised.levels(images))


def noise(count: int, side: int) -> np.ndarray:
    """uint8 [count, side, side, 3]; what is on a picture does not change how long it takes."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
