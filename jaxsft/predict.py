"""Name what is on pictures: the most probable classes of each, by a checkpoint of a run.

python -m jaxsft.predict --workdir DIR IMAGE_OR_FOLDER ... [--topk 5] [--checkpoint last|best|STEP] [--json FILE]

Folders are searched through as for training; a file that is named is tried whatever its ending. An image that can't be
read is named on stderr and left out. Of a model of several labels an image, those above 0.5 come first.
"""

from __future__ import annotations

import argparse

from jaxsft import cli, output, storage
from jaxsft.data import decode
from jaxsft.run.machine import keep_compilations
from jaxsft.run.prediction import find_images, predict
from jaxsft.run.saved import load_run


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=storage.location)
    parser.add_argument("images", nargs="+", type=storage.location, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--topk", type=int, default=5, help="classes an image (default: %(default)s)")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step (default: %(default)s)")
    parser.add_argument("--json", type=output.json_to, default="", help="write the predictions; -: on stdout")
    args = parser.parse_args()
    if args.topk < 1:
        raise cli.UserError(f"--topk is {args.topk}", "it must be 1 or more")
    keep_compilations()
    paths = find_images(args.images)
    run = load_run(args.workdir, args.checkpoint)
    results = []
    for result in predict(run, paths, args.topk):
        listed = "  ".join(f"{entry['class']} {entry['probability']:.3f}" for entry in result["classes"])
        if "labels" in result:
            listed = f"{', '.join(result['labels']) or '-'} ({listed})"
        cli.say(f"{result['file']}: {listed}")
        results.append(result)
    if not results:
        raise cli.UserError(f"none of {len(paths)} images can be read", f"name {', '.join(decode.FORMATS)} files")
    args.json({"step": run.step, "images": results})


if __name__ == "__main__":
    cli.run(main)
