"""How fast `jaxsft.predict` is on JPEGs of as many sizes as there are, and a plain loop of torchvision's, in turns.

Each has a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from jaxsft import cli, config
from jaxsft.bench import apart
from jaxsft.bench.step import CLASSES, missing, whole
from jaxsft.data.base import Options
from jaxsft.data.embedded import open_sample
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import init_variables
from jaxsft.models.initial import make_model
from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.progress import progress
from jaxsft.run import prediction
from jaxsft.run.machine import keep_compilations
from jaxsft.run.parallel import cores_are_devices
from jaxsft.run.saved import Run

SHORT = 300  # px, the short side of a photograph at least; ImageNet's has about 375
TOPK = 5
LAYOUTS = ("channels_last", "NCHW")
Turn = Callable[[], int]  # predicts all pictures and returns how many


class Asked(NamedTuple):
    """What both are asked for."""

    arch: str
    image_size: int  # px
    batch_size: int
    workers: int  # that decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench predict`."""
    parser.add_argument("--arch", default="resnet18", choices=list(ARCHITECTURES), metavar="ARCH")
    parser.add_argument("--images", type=whole, default=500, help="and sizes; default: %(default)s")
    parser.add_argument("--image-size", type=whole, default=224, help="px, of the model's input; default: %(default)s")
    parser.add_argument("--batch-size", type=whole, default=32, help="default: %(default)s")
    parser.add_argument("--workers", type=whole, default=2, help="that decode; default: %(default)s")
    parser.add_argument(
        "--rounds", type=whole, default=5, help="turns of each; the median counts; default: %(default)s"
    )
    parser.add_argument("--against", choices=("torch",), help="a plain loop, the better of both layouts")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a line, and return it.

    A turn is all that the command does with its pictures: it starts what decodes, decodes, computes and ranks. The
    first turn of each, in which ours is traced and compiled too, is told by itself.

    Returns:
      "images_per_sec" and "seconds", the median of the turns, "all" of them, and "first_seconds"; with `--against` the
      same under "against.torch", with its "layout", and "ratio".

    Raises:
      UserError: torchvision is missing.
    """
    with tempfile.TemporaryDirectory(prefix="jaxsft-bench-") as folder:
        paths = write_pictures(Path(folder), args.images)
        asked = Asked(args.arch, args.image_size, args.batch_size, args.workers)
        made: dict[str, tuple[Any, ...]] = {"jaxsft": (ours, asked, paths)}
        if args.against:
            made |= {layout: (torchs, asked, paths, layout) for layout in LAYOUTS}
        seconds: dict[str, list[float]] = {name: [] for name in made}
        with apart.contestants(made) as contestants:
            for _ in range(args.rounds + 1):
                for name, turn in contestants.items():
                    spent, count = turn.timed(1)
                    seconds[name].append(spent)
                    assert count == len(paths), f"{name} predicted {count} of {len(paths)} pictures"
    results = {name: result(values, args.images) for name, values in seconds.items()}
    record = results.pop("jaxsft")
    said = f"predict  images/s: jaxsft {record['images_per_sec']:.1f}"
    if results:
        layout = min(results, key=lambda name: results[name]["seconds"])
        other = {**results[layout], "layout": layout}
        ratio = record["images_per_sec"] / other["images_per_sec"]
        record |= {"against": {args.against: other}, "ratio": ratio}
        said += f"  {args.against} {other['images_per_sec']:.1f} (ratio {ratio:.2f}, {layout})"
    cli.say(said)
    return record


def result(seconds: list[float], images: int) -> dict[str, Any]:
    """The median turn after the first."""
    first, *others = seconds
    median = statistics.median(others)
    return {"images_per_sec": images / median, "seconds": median, "all": others, "first_seconds": first}


def ours(asked: Asked, paths: list[str]) -> Turn:
    """What `python -m jaxsft.predict` does with a run of this network."""
    keep_compilations()
    c = config.default()
    c.model.arch, c.model.weights, c.data.image_size = asked.arch, "", asked.image_size
    c.data.batch_size, c.data.workers = asked.batch_size, asked.workers
    config.check(c)
    cores_are_devices()  # as `load_run` does
    model = make_model(c, CLASSES)
    card = ModelCard(asked.arch, CLASSES, preprocessing=preprocessing(asked.image_size))
    saved = Run(Path(), c, card, model, init_variables(model, 0, asked.image_size), 0)
    return lambda: sum(1 for _ in prediction.predict(saved, paths, TOPK))


def preprocessing(side: int) -> Preprocessing:
    """ImageNet's."""
    return Preprocessing(round(side * 256 / 224), side)


def torchs(asked: Asked, paths: list[str], layout: str) -> Turn:
    """The loop that PyTorch's users write: PIL images through torchvision's transforms in a DataLoader's workers.

    Raises:
      UserError: torchvision is missing.
    """
    try:
        import torch
        from torchvision import transforms
        from torchvision.datasets.folder import pil_loader
    except ImportError:
        raise missing("torchvision", "torch") from None
    from convert.reference import torchvision_model

    to = preprocessing(asked.image_size)
    transform = transforms.Compose(
        [
            transforms.Resize(to.resize_size),
            transforms.CenterCrop(to.crop_size),
            transforms.ToTensor(),
            transforms.Normalize(to.mean, to.std),
        ]
    )

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            return transform(pil_loader(paths[index]))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = torchvision_model(asked.arch, CLASSES, asked.image_size).to(device=device, memory_format=memory).eval()

    def turn() -> int:
        found: list[Any] = []
        # Forked, as a script's are on Linux; a process that was spawned would spawn its own.
        loader = torch.utils.data.DataLoader(
            Pictures(), asked.batch_size, num_workers=asked.workers, multiprocessing_context="fork"
        )
        with torch.inference_mode():
            for batch in loader:
                logits = model(batch.to(device=device, memory_format=memory))
                found += zip(*(part.tolist() for part in logits.softmax(1).topk(TOPK)), strict=True)
        return len(found)

    return turn


def write_pictures(folder: Path, count: int) -> list[str]:
    """`count` JPEGs of as many sizes, upright and not, of about 45 KB: enlarged images with noise, as `bench data` has.

    Returns:
      Their paths.
    """
    small, random = open_sample("", "train", Options()), np.random.default_rng(0)
    paths = []
    for i in progress(range(count), desc="writing JPEGs", unit="image"):
        sides = (SHORT + i % 150, 400 + i // 2)
        width, height = sides if i % 2 else sides[::-1]
        image = PIL.Image.fromarray(small.images[i % len(small)]).resize((width, height), PIL.Image.Resampling.BICUBIC)
        noisy = np.asarray(image, np.float32) + random.normal(0, 6, (height, width, 1)).astype(np.float32)
        paths.append(str(folder / f"{i:06d}.jpg"))
        PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths
