"""Evaluate a finished or running run: every example once.

python -m jaxsft.evaluate --workdir DIR [--checkpoint best] [--data SOURCE --split SPLIT --data-dir DIR] [--json FILE]

Of another source (--data) without splits of its own every image is evaluated. A source that a config file registers is
known once that file is loaded: --config FILE.
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew

import argparse

from jaxsft import cli, output, storage
from jaxsft.flags import parse_flags
from jaxsft.models.precision import said
from jaxsft.run.evaluation import evaluate_run, of_split, open_examples
from jaxsft.run.machine import keep_compilations
from jaxsft.run.saved import load_run


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
    parser.add_argument("--json", type=output.json_to, default="", help="write the result; -: on stdout")
    args = parser.parse_args()

    if args.config:
        parse_flags([f"--config={args.config}"], "", {})
    keep_compilations()
    run = load_run(args.workdir, args.checkpoint)
    examples = open_examples(run, args.data, args.split, args.data_dir)
    result = evaluate_run(run, examples)
    computed_in = said(run.config.train.precision, run.config.train.matmul_precision, examples.parallel.devices)
    args.json({"step": run.step, "precision": computed_in, **result.record(run.card.names)})
    cli.say(f"{args.workdir} at step {run.step}: {result.summary()}{of_split(examples.source)}; {computed_in}")


if __name__ == "__main__":
    cli.run(main)
