"""Name what is on pictures: the most probable classes of each, by a checkpoint of a run.

python -m jaxsft.predict --workdir DIR IMAGE_OR_FOLDER ... [--topk 5] [--out FILE.csv|FILE.jsonl|-] [--json FILE]
find . -name '*.jpg' -print0 | python -m jaxsft.predict --workdir DIR -

Folders are searched through as for training; a file that is named is tried whatever its ending. A pattern in quotes
('pictures/**/*.jpg') is resolved here, ** being any number of folders. `-` and --list FILE take names from a list, one
a line or ended by zero bytes. Of a model of several labels an image, those above 0.5 come first.

--out writes a line for each picture, JSON lines (`-`: on stdout, as they come) or a table. The probabilities are those
of `evaluate` on the same files. An image that can't be read is named on stderr and passed over; the exit status is 1
then, and 2 where none can be read.
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew
    machine.collect_seldom()

import argparse
import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxsft import cli, output, storage
from jaxsft.data import decode, loose
from jaxsft.data.loader import BadFiles
from jaxsft.progress import progress
from jaxsft.run.machine import keep_compilations
from jaxsft.run.prediction import predict
from jaxsft.run.saved import Run, load_run

Entry = dict[str, Any]
STDIN = "-"
LABELS = ";"  # between the labels of an image in a table, where the run's own has nothing


def out_to(file: str) -> tuple[str, Callable[[], Any]]:
    """Argparse's `type` for --out: the form, 'csv' or 'jsonl', and what `output.text_to` gives. Raises UserError."""
    form = "jsonl" if file in output.STDOUT else file.rpartition(".")[2].lower()
    if file and form not in ("csv", "jsonl"):
        raise cli.UserError(f"--out {file} is no name for predictions", "let it end in .csv or .jsonl, or give -")
    return form, output.text_to(file)


def listed(args: argparse.Namespace) -> list[str]:
    """The names in the lists that are given. Raises UserError."""
    names: list[str] = []
    for file in [*args.list, *(STDIN for image in args.images if image == STDIN)]:
        try:
            names += loose.names_in(sys.stdin.buffer.read() if file == STDIN else storage.location(file).read_bytes())
        except OSError as error:
            raise cli.UserError(f"{file} can't be read: {error.strerror}", "name a file of names") from None
    return names


def said(entry: Entry) -> str:
    """A picture and its classes, for people."""
    classes = "  ".join(f"{one['class']} {one['probability']:.3f}" for one in entry["classes"])
    return f"{entry['file']}: " + (f"{', '.join(entry['labels']) or '-'} ({classes})" if "labels" in entry else classes)


class Form(NamedTuple):
    """How predictions are written, one after the other."""

    head: str
    line: Callable[[Entry], str]
    between: str = ""
    tail: str = ""


def as_object(step: int) -> Form:
    """{"step", "images": [...]}, a line a picture."""
    head = f'{{\n  "step": {step},\n  "images": [\n    '
    return Form(head, json.dumps, ",\n    ", "\n  ]\n}\n")


def as_table(run: Run, topk: int) -> Form:
    """CSV: file, of several labels an image "labels", then class_1, probability_1, class_2 and so on."""
    several = run.card.multi_label
    ranks = range(1, min(topk, run.card.num_classes) + 1)
    names = [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]

    def line(entry: Entry) -> str:
        labels = [(run.config.data.label_delimiter or LABELS).join(entry["labels"])] if several else []
        return row([entry["file"], *labels, *(value for one in entry["classes"] for value in one.values())])

    return Form(row(["file", *["labels"] * several, *names]), line)


def row(cells: Sequence[Any]) -> str:
    """A line of a table, quoted where it must be."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def main() -> int:
    parser = cli.Parser(
        prog="python -m jaxsft.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=storage.location)
    parser.add_argument("images", nargs="*", metavar="IMAGE_OR_FOLDER", help="or a pattern in quotes; -: see --list")
    parser.add_argument("--list", action="append", default=[], metavar="FILE", help="of names of images; -: stdin")
    parser.add_argument("--topk", type=int, default=5, help="classes an image (default: %(default)s)")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="over all devices (default: the run's)")
    parser.add_argument(
        "--out", type=out_to, default="", metavar="FILE", help="write them line by line: .csv, .jsonl; -: on stdout"
    )
    parser.add_argument("--json", default="", metavar="FILE", help="as one object; -: on stdout")
    args = parser.parse_args()
    if not args.images and not args.list:
        parser.error("the following arguments are required: IMAGE_OR_FOLDER")
    if args.topk < 1:
        raise cli.UserError(f"--topk is {args.topk}", "it must be 1 or more")
    if args.batch_size is not None and args.batch_size < 1:
        raise cli.UserError(f"--batch-size is {args.batch_size}", "it must be 1 or more")
    form, open_out = args.out
    if sys.stdout is sys.stderr and args.json in output.STDOUT:
        raise cli.UserError("--out and --json are both stdout", "name a file for one of them")
    open_json = output.text_to(args.json, whole=True)
    keep_compilations()
    paths = loose.find([image for image in args.images if image != STDIN], listed(args))
    run = load_run(args.workdir, args.checkpoint)
    lines = as_table(run, args.topk) if form == "csv" else Form("", lambda entry: json.dumps(entry) + "\n")
    bad, count = BadFiles("skip"), 0
    with open_out() as write_out, open_json() as write_json, progress(total=len(paths), unit="image") as bar:
        written = ((write_out, lines), (write_json, as_object(run.step)))
        for entry in predict(run, paths, args.topk, batch_size=args.batch_size, bad=bad, done=bar.update):
            for write, as_ in written:
                write((as_.between if count else as_.head) + as_.line(entry))
            with contextlib.nullcontext() if bar.disable else bar.external_write_mode():
                cli.say(said(entry))
            count += 1
        if not count:
            raise cli.UserError(f"none of {len(paths)} images can be read", f"name {', '.join(decode.FORMATS)} files")
        for write, as_ in written:
            write(as_.tail)
    return cli.FAILED if bad else 0


if __name__ == "__main__":
    cli.run(main)
