"""Show what on pictures speaks for a class: Grad-CAM, Grad-CAM++, integrated gradients, occlusion.

python -m jaxsft.explain --workdir DIR IMAGE_OR_FOLDER ... --out DIR [--method gradcam] [--class predicted]

Writes for each picture, class and method the map over the picture (PNG), index.html with all of them, and overview.png
with the first. --method and --class may be given several times. Images are found and read as by jaxsft.predict: one
that can't be is named on stderr and passed over; the exit status is 1 then.
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew
    machine.collect_seldom()

import argparse
import contextlib
import re
from pathlib import Path
from typing import Any

from jaxsft import cli, output, storage
from jaxsft.data import decode
from jaxsft.interpret import explanations, integrated_gradients
from jaxsft.interpret.baseline import BASELINES
from jaxsft.interpret.explanations import METHODS, Explained
from jaxsft.run.explanation import PREDICTED, TRUE, Asked, explain, windows
from jaxsft.run.machine import keep_compilations
from jaxsft.run.prediction import find_images
from jaxsft.run.saved import Run, load_run

INDEX, OVERVIEW = "index.html", "overview.png"
LONGEST = 40  # letters of a name that a file's name takes over
CALLED = {"mean": "the mean colour of the training data", "black": "black", "white": "white"}
FAR = 0.05  # of the logit's change: attributions that miss it by more want more steps


def write(run: Run, paths: list[str], asked: Asked, folder: Path) -> list[dict[str, Any]]:
    """Fill a folder with overlays and the sheet, say each, and return what there is to say of each as JSON.

    Raises:
      UserError: as `explain`, or no picture can be read.
    """
    entries: list[dict[str, Any]] = []
    first: list[Explained] = []
    found = explain(run, paths, asked)
    with (folder / INDEX).open("w", encoding="utf-8") as sheet:
        sheet.write(explanations.head(f"{run.card.arch} at step {run.step}, explained", facts(run, asked)))
        for number, one in enumerate(found, 1):
            pictures = explanations.encoded(one)
            sheet.write(explanations.section(one, pictures))
            first += [one] * (len(first) < explanations.ROWS)
            names: set[str] = set()
            for each, content in zip(one.explanations, pictures[1:], strict=True):
                name = file_name(number, one.file, each.method, each.class_name, names)
                (folder / name).write_bytes(content)
                with contextlib.suppress(BrokenPipeError):  # the folder is made, whether somebody reads this or not
                    cli.say(f"{one.file}: {each.said()}: {name}")
                entry = {"file": one.file, "method": each.method, "class": each.class_name, "logit": each.logit}
                entry |= {"probability": each.probability, "layer": each.layer or None, "picture": name}
                if each.completeness:
                    total, change = each.completeness
                    entry["completeness"] = {"sum": total, "change": change, "error": each.completeness.error}
                entries.append(entry)
        sheet.write(explanations.FOOT)
    if not first:
        raise cli.UserError(f"none of {len(paths)} images can be read", f"name {', '.join(decode.FORMATS)} files")
    (folder / OVERVIEW).write_bytes(explanations.overview(first))
    far = [e for e in entries if "completeness" in e and not is_complete(**e["completeness"])]
    if far:
        what = f"{len(far)} of the integrated gradients miss the change of the logit by more than {FAR:.0%}"
        cli.warn(f"{what}: take more --steps than {asked.steps}")
    return entries


def is_complete(sum: float, change: float, error: float) -> bool:
    """Whether attributions add up to what they should, nearly."""
    return abs(error) <= FAR * max(abs(change), abs(sum))


def facts(run: Run, asked: Asked) -> list[tuple[str, str]]:
    """What the sheet says of the model and of what was asked."""
    found = [("workdir", str(run.workdir)), ("methods", ", ".join(METHODS[name] for name in asked.methods))]
    if "integrated_gradients" in asked.methods:
        found.append(("integrated gradients", f"{asked.steps} steps from {CALLED[asked.baseline]}"))
    if "occlusion" in asked.methods:
        window, stride = windows(run, asked)
        of = f"{window} px, moved by {stride} px, covered with {CALLED[asked.baseline]}"
        found.append(("occlusion", f"windows of {of}"))
    return found


def file_name(number: int, file: str, method: str, class_name: str, taken: set[str]) -> str:
    """A name for an overlay that every system takes, not in `taken`, to which it is added."""
    stem = file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    parts = [re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:LONGEST] or "_" for text in (stem, class_name)]
    name, count = f"{number:03}-{parts[0]}-{method}-{parts[1]}.png", 1
    while name in taken:  # two classes that differ in other letters alone
        count += 1
        name = f"{number:03}-{parts[0]}-{method}-{parts[1]}-{count}.png"
    taken.add(name)
    return name


def main() -> int:
    parser = cli.Parser(
        prog="python -m jaxsft.explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=storage.location)
    parser.add_argument("images", nargs="+", type=storage.location, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--out", required=True, type=storage.location, help="a new folder, also in a bucket")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step (default: %(default)s)")
    parser.add_argument("--method", action="append", metavar="METHOD", help=f"{', '.join(METHODS)} (default: gradcam)")
    parser.add_argument(
        "--class", action="append", dest="classes", metavar="NAME",
        help=f"a class by name; {PREDICTED}: the most probable; {TRUE}: the folder's name (default: {PREDICTED})",
    )  # fmt: skip
    parser.add_argument(
        "--layer", default="",
        help="torch's name of the layer whose map Grad-CAM takes, such as layer3 (default: the last map of the image)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=integrated_gradients.STEPS, help="of integrated gradients (default: %(default)s)"
    )
    parser.add_argument(
        "--baseline", default="mean",
        help=f"what integrated gradients start from and occlusion covers with: {', '.join(BASELINES)}"
        " (default: %(default)s, of the training data)",
    )  # fmt: skip
    parser.add_argument("--window", type=int, help="px that occlusion covers (default: an eighth of the side)")
    parser.add_argument("--stride", type=int, help="px from one window to the next (default: half a window)")
    parser.add_argument("--json", type=output.json_to, default="", help="write the numbers; -: on stdout")
    args = parser.parse_args()
    asked = Asked(
        tuple(dict.fromkeys(args.method or ["gradcam"])), tuple(dict.fromkeys(args.classes or [PREDICTED])),
        args.layer, args.steps, args.baseline, args.window, args.stride,
    )  # fmt: skip
    keep_compilations()
    paths = find_images(args.images)
    run = load_run(args.workdir, args.checkpoint)
    with storage.new_directory(args.out, last=INDEX) as folder:
        entries = write(run, paths, asked, folder)
    cli.say(f"{args.out / INDEX} shows all of them")
    args.json({"step": run.step, "explanations": entries})
    return cli.FAILED if len({entry["file"] for entry in entries}) < len(paths) else 0


if __name__ == "__main__":
    cli.run(main)
