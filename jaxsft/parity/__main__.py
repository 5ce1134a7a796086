"""Compare everything that is computed here with what PyTorch computes, and print a table, one row a quantity.

python -m jaxsft.parity --arch ARCH [--weights FILE] [--steps N] [--dtype float32|float64] [--json FILE]
python -m jaxsft.parity --workdir RUN IMAGE_OR_FOLDER ... [--checkpoint best] [--dtype ...] [--json FILE]

Without --weights both sides start from values drawn so that each of them shows in the result. With --workdir a run's
network and pictures of one's own are compared, from the file to the class, with PIL, torchvision's transforms, and its
network that has taken the exported weights. Exit status 1 when a row fails; the last line then names the first one, in
the order of computation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from convert import checkpoints, files, names
from jaxsft import cli, output, storage
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import ImageSizeError, variable_shapes
from jaxsft.models.precision import said
from jaxsft.models.weights import shapes
from jaxsft.parity import table

try:
    files.import_torch()
except cli.UserError as error:  # one line instead of a traceback, before what imports torch at its top
    sys.exit(cli.report_error(error))

from jaxsft.parity import networks, oracle, pictures
from jaxsft.parity.compare import Options, compare, model_for
from jaxsft.run.saved import load_run

NUM_CLASSES = 10
PACKAGES = ("jaxsft", "jax", "flax", "torch", "torchvision", "numpy", "pillow")
DIFFERING = 5  # pictures that are named
PRODUCTS = "highest"  # a TPU or GPU by itself rounds float32 before it multiplies, far more than the tolerances allow


def image_size(text: str) -> tuple[int, int]:
    """'64' or '97x131' (height x width) as numbers."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HxW")
    return int(match[1]), int(match[2] or match[1])


def natural(text: str) -> int:
    """A whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Arithmetic that deserves a comparison: float32 products in full, and float64 where asked for."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision(PRODUCTS):
        yield


def computed_in(dtype: str) -> str:
    """The numbers of this side, and how they are multiplied, for people."""
    return said(dtype, PRODUCTS, jax.devices()[:1]) if dtype == "float32" else dtype


def versions() -> dict[str, str]:
    """Of all that computes; of this package where it is installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def printed(what: str, found: Iterable[table.Row], dtype: str, every: bool = False) -> list[table.Row]:
    """All rows, printed as they come, under who computed what with what and when, and above what the columns mean."""
    rows: list[table.Row] = []

    def remembered() -> Iterator[table.Row]:
        for row in found:
            rows.append(row)
            yield row

    cli.say(f"{what} on 1 x {jax.devices()[0].device_kind}: {computed_in(dtype)}")
    cli.say(f"{', '.join(' '.join(pair) for pair in versions().items())}; {datetime.date.today()}; torch on the CPU")
    cli.say(table.HEADER)
    for line in table.lines(remembered(), every):
        cli.say(line)
    for line in table.footer(rows, dtype):
        cli.say(line)
    return rows


def run(options: Options, weights: str = "", every: bool = False) -> list[table.Row]:
    """All rows of a comparison, printed as they come: one line a quantity, or `every` tensor's own.

    Raises:
      UserError: torchvision has no such model, it can't take such images, or the weights can't be had or do not fit.
    """
    source = checkpoints.read(weights, options.arch) if weights else None
    num_classes = (source and source.card.num_classes) or NUM_CLASSES
    height, width = options.image_size
    try:  # before torch, which has a traceback for it
        variable_shapes(ARCHITECTURES[options.arch](), options.image_size)
    except ImageSizeError as error:
        raise cli.UserError(f"--image-size is {height}x{width}", str(error)) from None
    torch_model = networks.build(options.arch, num_classes, options.seed, height)
    with precision(options.dtype):
        model = model_for(options, num_classes)
        if source:
            # Through our table of names, whose message names every tensor that does not fit. A head that is not there
            # stays torch's own.
            values = names.to_flax(source.tensors, shapes(source.card), options.arch)
            if resized := family_of(options.arch).resized:
                values = resized(values, height)
            fitting = names.to_torch(values, options.arch)
            oracle.load(torch_model, oracle.state(torch_model) | fitting)
        return printed(options.arch, compare(options, model, torch_model), options.dtype, every)


def run_pictures(args: argparse.Namespace) -> tuple[list[table.Row], dict[str, Any]]:
    """All rows of a run and pictures, printed, the pictures that differ most below; and what was compared.

    Raises:
      UserError: there is no such run, torchvision has no such network, or no picture can be read.
    """
    paths = pictures.paths_of(args.images)
    tuned = load_run(args.workdir, args.checkpoint)
    what = f"{args.workdir} at step {tuned.step}, {tuned.card.arch},"
    with precision(args.dtype):
        rows = printed(what, pictures.compare(tuned, paths, args.dtype), args.dtype, args.all)
    turned = "turned as their EXIF tag says" if tuned.config.data.exif_orientation else "as they lie"
    cli.say(f"Pictures are taken {turned}, on both sides, as the run's data.exif_orientation says.")
    cli.say("The pictures that differ most, in the numbers of max |diff|:")
    for line in pictures.differing_most(rows, DIFFERING):
        cli.say(line)
    record = {"workdir": str(args.workdir), "step": tuned.step, "arch": tuned.card.arch, "dtype": args.dtype}
    return rows, record


def main() -> int:
    parser = cli.Parser(
        prog="python -m jaxsft.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", help=", ".join(ARCHITECTURES))
    parser.add_argument("--workdir", type=storage.location, help="of a run, to be compared on pictures")
    parser.add_argument("images", nargs="*", metavar="IMAGE_OR_FOLDER", help="files, folders, patterns in quotes")
    parser.add_argument("--checkpoint", default="last", help="of the run: last, best or a step; default %(default)s")
    parser.add_argument("--weights", default="", help="IMAGENET1K_V1 and so on, a .pth or a .safetensors file")
    parser.add_argument(
        "--steps", type=natural, default=10, help="updates of each recipe, default %(default)s; 0: none"
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--batch-size", type=natural, default=8, help="default %(default)s")
    parser.add_argument("--image-size", type=image_size, default=(64, 64), help="N or HxW, default 64")
    parser.add_argument("--seed", type=natural, default=0, help="of weights and inputs, default %(default)s")
    parser.add_argument("--all", action="store_true", help="print a line for every tensor, not for every quantity")
    parser.add_argument(
        "--json", type=output.json_to, default="", help="write name, max_abs, relative, tolerance, passed; -: on stdout"
    )
    args = parser.parse_args()
    if bool(args.arch) == bool(args.workdir):
        parser.error("give either --arch ARCH or --workdir RUN IMAGE_OR_FOLDER ...")
    if bool(args.images) != bool(args.workdir):
        parser.error("IMAGE_OR_FOLDER ... and --workdir RUN go together")
    if args.workdir:
        rows, record = run_pictures(args)
        count = len(rows) // len(pictures.QUANTITIES)
        what = f"{args.workdir}, {args.dtype}, {count} picture{'s' * (count != 1)}"
    else:
        options = options_of(args)
        rows, record = run(options, args.weights, args.all), dataclasses.asdict(options)
        what = f"{args.arch}, {args.dtype}, {args.steps} steps: {len(rows)} tensors and numbers compared"
    worst = table.first_failure(rows)
    device = jax.devices()[0].device_kind
    made = {"precision": computed_in(args.dtype), "device": device, "date": str(datetime.date.today())}
    records = [row.record() for row in rows]
    args.json({**record, **made, "versions": versions(), "passed": worst is None, "rows": records})
    failed = sum(not row.passed for row in rows)
    if worst is None:
        cli.say(f"passed: {what}")
        return 0
    cli.say(f"FAILED: {what}, {failed} differ; the first is {worst.name}")
    return 1


def options_of(args: argparse.Namespace) -> Options:
    """What is compared of an architecture. Raises UserError."""
    if args.arch not in ARCHITECTURES:
        raise cli.UserError(f"unknown arch {args.arch!r}", cli.nearest(args.arch, list(ARCHITECTURES)))
    if args.batch_size < 2:
        raise cli.UserError(f"--batch-size is {args.batch_size}", "batch norm trains on 2 images and more")
    if min(args.image_size) < 32:
        raise cli.UserError(f"--image-size is {min(args.image_size)}", "the smallest is 32")
    return Options(args.arch, args.dtype, args.steps, args.batch_size, args.image_size, args.seed)


if __name__ == "__main__":
    cli.run(main)
