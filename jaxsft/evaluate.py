"""Evaluate a finished or running run: every example once.

python -m jaxsft.evaluate --workdir DIR [--checkpoint best] [--data SOURCE --split SPLIT --data-dir DIR] [--json FILE]

It prints accuracy and loss, their intervals, precision, recall and F1 of each class, which classes are taken for which,
and how far probabilities can be trusted; --json writes the same in full, --predictions FILE.csv|parquet a row for each
example. --tta averages over several views of each image. --fit-temperature SPLIT makes the probabilities honest by one
number, which it writes into the run's model.json, where predict and the others find it.

Of another source (--data) without splits of its own every image is evaluated. A source that a config file registers is
known once that file is loaded: --config FILE.
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew
    machine.collect_seldom()

import argparse
from typing import Any

from jaxsft import cli, output, storage
from jaxsft.flags import parse_flags
from jaxsft.interpret import bootstrap, predictions, tables
from jaxsft.models.precision import said
from jaxsft.models.weights import CARD
from jaxsft.run import temperature
from jaxsft.run.evaluation import Examples, evaluate_into, names_of, of_split, open_examples
from jaxsft.run.machine import keep_compilations
from jaxsft.run.saved import Run, load_run


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=storage.location)
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: %(default)s")
    parser.add_argument("--data", default="", help="another source than the run's, such as tfds:cifar10")
    parser.add_argument("--split", default="", help="another split than the run's eval_split")
    parser.add_argument("--data-dir", default="", help="of TFDS")
    parser.add_argument("--config", default="", help="a config file that registers the source")
    parser.add_argument("--tta", default="", help="average over views of each image: flip, crops or flip+crops")
    parser.add_argument("--fit-temperature", default="", metavar="SPLIT", help="fit it on this split of the data")
    parser.add_argument("--same-split", action="store_true", help="fit it on images that are evaluated, too")
    parser.add_argument(
        "--bootstrap", type=int, default=bootstrap.RESAMPLES, metavar="N", help="resamples; 0: none (%(default)s)"
    )
    parser.add_argument("--top-losses", type=int, default=0, metavar="N", help="name the examples of the largest loss")
    parser.add_argument(
        "--predictions",
        type=predictions.predictions_to,
        default="",
        metavar="FILE",
        help="a row an example: .csv, .parquet",
    )
    parser.add_argument("--json", type=output.json_to, default="", help="write the result; -: on stdout")
    args = parser.parse_args()
    check(args)

    if args.config:
        parse_flags([f"--config={args.config}"], "", {})
    keep_compilations()
    run = load_run(args.workdir, args.checkpoint)
    examples = open_examples(run, args.data, args.split, args.data_dir, args.tta)
    fitted = None
    if args.fit_temperature:
        fitted = open_examples(run, args.data, args.fit_temperature, args.data_dir)
        made_ready(args, run, fitted, examples)
    evaluate(args, run, examples, fitted)


def check(args: argparse.Namespace) -> None:
    """Raise a UserError where numbers or settings do not go together."""
    for name in ("bootstrap", "top_losses"):
        if getattr(args, name) < 0:
            raise cli.UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}", "it must be 0 or more")
    if args.fit_temperature and args.tta:
        what = "--fit-temperature fits the network by itself, as predict uses it, and --tta evaluates several views"
        raise cli.UserError(what, "leave out one of them")


def made_ready(args: argparse.Namespace, run: Run, fitted: Examples, examples: Examples) -> None:
    """Raise a UserError, before the work, where a temperature can't be fitted on `fitted` or can't be written."""
    if not args.same_split:
        temperature.check_apart(fitted.source.split, examples.source.split)
    if not args.data:
        temperature.warn_of_training(fitted.source.split, run.config.data.train_split)
    storage.check_writable(args.workdir / CARD)


def evaluate(args: argparse.Namespace, run: Run, examples: Examples, fitted: Examples | None) -> None:
    """Evaluate, write what is to be written, and say what is found."""
    names, comparison = names_of(run, examples.source), temperature.Comparison(run.card.temperature)
    if fitted is not None:
        run = temperature.with_fitted(run, fitted)
    see = comparison.see if fitted is not None else None
    result = evaluate_into(run, examples, args.predictions or None, see)
    found = result.interval(args.bootstrap) if args.bootstrap else {}
    computed_in = said(run.config.train.precision, run.config.train.matmul_precision, examples.parallel.devices)
    record: dict[str, Any] = {
        "step": run.step,
        "precision": computed_in,
        **result.record(names),
        **tables.details(result, names, found, args.bootstrap),
        "temperature": run.card.temperature,
        "evaluated_on": examples.source.split,
        "tta": args.tta,
        "left_out": dict(examples.left_out),
    }
    shown = tables.lines(result, names, found, args.bootstrap)
    shown[-1] += f" at temperature {run.card.temperature:.4g}"
    if fitted is not None:
        temperature.write(run)
        record["temperature_fit"] = temperature.record(run, fitted, comparison, result)
        shown.append(temperature.line(record["temperature_fit"], run.workdir))
    if args.top_losses:
        record["top_losses"] = tables.losses_of(result, examples.source, names, args.top_losses)
        shown += ["largest losses:", *map(tables.line_of_loss, record["top_losses"])]
    if examples.left_out:
        shown.append(f"{len(examples.left_out)} images can't be read and are left out")
    if args.predictions:
        shown.append(f"{args.predictions}: {result.count} rows")
    args.json(record)
    views = f", {len(examples.views)} views an image" if examples.views else ""
    cli.say(f"{run.workdir} at step {run.step}: {result.summary()}{of_split(examples.source)}{views}; {computed_in}")
    for line in shown:
        cli.say(line)


if __name__ == "__main__":
    cli.run(main)
