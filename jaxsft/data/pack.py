"""Pack a set of pictures once, so that training reads no more than it needs: decoded and resized, or file by file.

python -m jaxsft.data.pack folder:PATH --out DIR --size 256

    --config.data.source=packed:DIR then takes the place of folder:PATH. Every split is packed, its classes, labels and
    names of images too. Give --size the px that the run resizes the short side to: data.resize_size, or image_size
    where that is not set; of the presets of weights it is 256 or 232 for 224 px. Evaluated at that size packed pictures
    give the very pixels that the files do. --jpeg keeps the files as they are instead: a bucket serves a few large
    objects far better than many small ones, and they take less room.

    An interrupted command is gone on with by the same one.
"""

from __future__ import annotations

import argparse
import re

from jaxsft import cli, storage
from jaxsft.cli import UserError
from jaxsft.data import decode
from jaxsft.data.base import Options
from jaxsft.data.packing import SHARD_MB, Form, pack


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.data.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="as --config.data.source takes it: folder:PATH, csv:FILE, tfds:NAME, hf:NAME")
    parser.add_argument("--out", type=storage.location, required=True, help="a new folder, also in a bucket")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--size", type=int, help="px, what the short side of larger pictures is made")
    kind.add_argument(
        "--jpeg", action="store_true", help="keep the files of pictures as they are; what lies in none becomes a PNG"
    )
    parser.add_argument("--interpolation", choices=tuple(decode.REACH), default="bilinear", help="of resizing")
    parser.add_argument("--shard-mb", type=int, default=SHARD_MB, help="MB of a file of records; default: %(default)s")
    parser.add_argument("--threads", type=int, help="that decode; default: one a core")
    parser.add_argument("--data-dir", default="", help="of TFDS")
    parser.add_argument(
        "--eval-fraction", type=float, default=0.1, help="of each class, where there is no split for it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that division; default: %(default)s, as a run's")
    parser.add_argument("--class-order", choices=("text", "numeric"), default="text")
    parser.add_argument("--label-delimiter", default="", help="of csv: between the labels of an image with several")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="at a broken picture")
    parser.add_argument("--as-they-lie", action="store_true", help="don't turn pictures as their EXIF tag says")
    args = parser.parse_args()
    for name, low, high in (("size", 1, 4096), ("shard_mb", 1, 4096), ("threads", 1, 4096)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} is {value}", f"it must be {low} to {high}")
    if not 0 < args.eval_fraction < 1:
        raise UserError(f"--eval-fraction is {args.eval_fraction:g}", "it must be above 0, below 1")
    options = Options(
        args.data_dir,
        args.eval_fraction,
        args.seed,
        args.on_error,
        not args.as_they_lie,
        class_order=args.class_order,
        label_delimiter=args.label_delimiter,
    )
    try:
        index = pack(
            args.source, args.out, Form(args.size or 0, args.interpolation, args.shard_mb), options, args.threads
        )
    except UserError as error:  # what a source says is about the keys of a run
        of_a_run = re.compile(r"--config\.data\.(\w+)")
        error.args = (of_a_run.sub(lambda key: "--" + key[1].replace("_", "-"), str(error)), *error.args[1:])
        raise
    shards = [shard for entry in index["splits"].values() for shard in entry["shards"]]
    images, size = sum(shard["records"] for shard in shards), sum(shard["bytes"] for shard in shards)
    left_out = sum(len(entry["left_out"]) for entry in index["splits"].values())
    also = f"; {left_out} left out" if left_out else ""
    cli.say(f"{args.out}: {images} images in {len(shards)} files, {size / 2**20:.0f} MB{also}")


if __name__ == "__main__":
    cli.run(main)
