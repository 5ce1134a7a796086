"""How fast images come: this loader, and torchvision's, on one folder of JPEGs, in turns; and how long a step waits."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image

from jaxsft import cli
from jaxsft import config as config_module
from jaxsft.bench.step import whole
from jaxsft.data.augment import RANDOM_CROP
from jaxsft.data.base import Options, Source
from jaxsft.data.embedded import open_sample
from jaxsft.data.folder import open_folder
from jaxsft.data.loader import Loader, make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import EvalPlan, Plan, TrainPlan
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import init_variables
from jaxsft.models.initial import make_model
from jaxsft.models.weights import Preprocessing
from jaxsft.progress import progress
from jaxsft.run.parallel import DataParallel
from jaxsft.run.program import Program

PHOTOGRAPHS = ((375, 500), (500, 375), (480, 640), (427, 640))  # (height, width) px, as ImageNet's are
WARM_UP, MOST_STEPS = 6, 30
OURS = ("jaxsft", "packed")
AUGMENT = (RANDOM_CROP, "flip")
Feed = Iterator[Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench data`."""
    parser.add_argument("--folder", type=cli.local_path, help="PATH/CLASS/*.jpg; default: one is made and removed")
    parser.add_argument("--images", type=whole, default=5000, help="of the folder that is made; default: %(default)s")
    parser.add_argument("--image-size", type=whole, default=224, help="px; default: %(default)s")
    parser.add_argument("--batch-size", type=whole, default=64)
    parser.add_argument(
        "--workers",
        type=int,
        choices=range(257),
        metavar="N",
        default=2,
        help="processes that decode; default: %(default)s",
    )
    parser.add_argument("--passes", type=whole, default=3, help="over the folder, of each; the median counts")
    parser.add_argument(
        "--packed", action="store_true", help="with data.cache too: what comes from the second epoch on"
    )
    parser.add_argument("--arch", default="", help="train it too, such as resnet18: how long does its step wait?")
    parser.add_argument("--against", choices=("torch",), help="torchvision's ImageFolder and torch's DataLoader too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return it.

    Returns:
      "images_per_sec" of training's and of evaluation's images, with `--packed` "packed" ones too, and with `--against`
      of torch, and the "ratio" of ours to that, with `--packed` the "packed_ratio" too;
      with `--arch` "step": images_per_sec "alone" and "with_loader", and the "waiting" share of the latter's time.
    """
    if args.arch and args.arch not in ARCHITECTURES:
        raise cli.UserError(f"--arch is {args.arch!r}", cli.nearest(args.arch, list(ARCHITECTURES)))
    with contextlib.ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxsft-bench-")))
        if not args.folder:
            write_folder(folder, args.images)
        options = Options(eval_fraction=0.5)
        source = open_folder(str(folder), "train+val", options)
        record: dict[str, Any] = {"images": len(source), "image_size": args.image_size, "workers": args.workers}
        for kind in ("train", "eval"):
            feeds: dict[str, Callable[[], Feed]] = {"jaxsft": functools.partial(ours, source, kind, args)}
            if args.packed:
                cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxsft-cache-"))
                feeds["packed"] = functools.partial(ours, source, kind, args, cache)
                for _ in feeds["packed"]():
                    pass  # the first epoch, in which it is written
            if args.against:
                feeds[args.against] = functools.partial(torchs, folder, kind, args)
            record[kind] = in_turns(feeds, args.passes)
        if args.arch:
            record["step"] = with_step(source, args)
    for kind in ("train", "eval"):
        row = record[kind]
        ratio = "".join(
            f"  {name.replace('_', ' ')} {row[name]:.2f}" for name in ("ratio", "packed_ratio") if name in row
        )
        speeds = "  ".join(f"{name} {speed:.0f}" for name, speed in row["images_per_sec"].items())
        cli.say(f"{kind:5}  images/s: {speeds}{ratio}")
    if args.arch:
        row = record["step"]
        speeds = f"alone {row['alone']:.0f}  with the loader {row['with_loader']:.0f}"
        cli.say(f"step   images/s: {speeds}  waits {row['waiting']:.1%} of the time")
    return record


def in_turns(feeds: dict[str, Callable[[], Feed]], passes: int) -> dict[str, Any]:
    """The median speed of each feed over `passes` passes, one feed after the other in every round.

    The first WARM_UP batches of a pass are not timed: workers start, and what they had ready meanwhile is no work done.
    Nor is their end, after the last batch.
    """
    speeds: dict[str, list[float]] = {name: [] for name in feeds}
    for _ in range(passes):
        for name, feed in feeds.items():
            batches = feed()
            for _ in itertools.islice(batches, WARM_UP):
                pass
            began, images, last = time.perf_counter(), 0, 0.0
            for size in batches:
                images, last = images + size, time.perf_counter()
            speeds[name].append(images / (last - began))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result: dict[str, Any] = {"images_per_sec": medians, "all": speeds}
    mine, *packed = (speed for name, speed in medians.items() if name in OURS)
    for other in (speed for name, speed in medians.items() if name not in OURS):
        result["ratio"] = mine / other
        if packed:
            result["packed_ratio"] = packed[0] / other
    return result


def loader_of(source: Source, kind: str, args: argparse.Namespace, cache: str = "") -> tuple[Loader, DataParallel]:
    """The loader of a run on one device, and that device."""
    preprocessing = Preprocessing(round(args.image_size * 256 / 224), args.image_size)
    order = Order(len(source), args.batch_size, seed=0)
    plan: Plan = TrainPlan(order) if kind == "train" else EvalPlan(len(source), args.batch_size)
    names = AUGMENT if kind == "train" else ()
    devices = DataParallel(devices=jax.local_devices()[:1])
    options: dict[str, Any] = {"augmentations": names, "workers": args.workers, "cache": cache}
    return make_loader(source, plan, devices, preprocessing, **options), devices


def ours(source: Source, kind: str, args: argparse.Namespace, cache: str = "") -> Feed:
    """The sizes of the batches of one pass, as they are on the device."""
    loader, _ = loader_of(source, kind, args, cache)
    for step in range(len(source) // args.batch_size):
        batch = jax.block_until_ready(loader.batch(step))
        yield batch["label"].size
    loader.close()


def with_step(source: Source, args: argparse.Namespace) -> dict[str, float]:
    """Images a second of the train step on one batch over and over, and on the batches of the loader."""
    config = config_module.default()
    config.model.arch, config.data.augment = args.arch, AUGMENT
    config.data.image_size, config.data.batch_size = args.image_size, args.batch_size
    loader, parallel = loader_of(source, "train", args)
    model = make_model(config, len(source.class_names))
    variables = init_variables(model, 0, args.image_size)
    program = Program(
        config, model, variables["params"], lambda step: 1e-3, 1000, 10_000, parallel, left=loader.preprocessing
    )
    update, state, dataset = program.phases()[0].train_step, program.state(variables), program.dataset({})
    count = min(len(source) // args.batch_size - WARM_UP, MOST_STEPS)
    fixed = loader.batch(0)
    for step in range(WARM_UP):
        state, counts = update(state, dataset, loader.batch(step))
    jax.block_until_ready(counts)
    began = time.perf_counter()
    for step in range(count):
        state, counts = update(state, dataset, loader.batch(WARM_UP + step))
    jax.block_until_ready(counts)
    fed = time.perf_counter() - began
    loader.close()
    began = time.perf_counter()
    for _ in range(count):
        state, counts = update(state, dataset, fixed)
    jax.block_until_ready(counts)
    alone = time.perf_counter() - began
    images = count * args.batch_size
    return {"alone": images / alone, "with_loader": images / fed, "waiting": max(1 - alone / fed, 0.0)}


def torchs(folder: Path, kind: str, args: argparse.Namespace) -> Feed:
    """The same with torchvision's reference transforms, as float32 tensors."""
    try:
        from torch.utils.data import DataLoader
        from torchvision import datasets, transforms
    except ImportError:
        raise cli.UserError("torchvision is not installed", "install the extra: pip install 'jaxsft[torch]'") from None

    size = args.image_size
    crops = {
        "train": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
        "eval": [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)],
    }
    normalise = transforms.Normalize(Preprocessing.mean, Preprocessing.std)
    data = datasets.ImageFolder(str(folder), transforms.Compose([*crops[kind], transforms.ToTensor(), normalise]))
    for _, labels in DataLoader(
        data, args.batch_size, shuffle=kind == "train", num_workers=args.workers, drop_last=True
    ):
        yield len(labels)


def write_folder(folder: Path, count: int) -> None:
    """`count` JPEGs in PATH/CLASS: one half CIFAR-10 images as they are, the other as large as photographs.

    The large ones are enlarged images with noise of a photograph's strength, so that their files are as long (about
    45 KB at quality 90) and take as long to decode.
    """
    small = open_sample("", "train", Options())
    random = np.random.default_rng(0)
    for i in progress(range(count), desc="writing JPEGs", unit="image"):
        image = PIL.Image.fromarray(small.images[i % len(small)])
        if i % 2:
            height, width = PHOTOGRAPHS[i // 2 % len(PHOTOGRAPHS)]
            large = np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC), np.float32)
            large += random.normal(0, 6, (height, width, 1)).astype(np.float32)
            image = PIL.Image.fromarray(large.clip(0, 255).astype(np.uint8))
        path = folder / small.class_names[small.labels[i % len(small)]] / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
