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
import dataclasses

from jaxsft import cli
from jaxsft.data.base import Options
from jaxsft.data.loader import BadFiles, make_loader
from jaxsft.data.reading import EvalPlan, in_memory
from jaxsft.data.sources import open_source, with_classes
from jaxsft.flags import parse_flags
from jaxsft.learn.steps import make_eval_step
from jaxsft.models.precision import said
from jaxsft.run.evaluation import evaluate, of_split
from jaxsft.run.machine import keep_compilations
from jaxsft.run.parallel import all_devices
from jaxsft.run.saved import load_run


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=cli.local_path)
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: %(default)s")
    parser.add_argument("--data", default="", help="another source than the run's, such as tfds:cifar10")
    parser.add_argument("--split", default="", help="another split than the run's eval_split")
    parser.add_argument("--data-dir", default="", help="of TFDS")
    parser.add_argument("--config", default="", help="a config file that registers the source")
    parser.add_argument("--json", type=cli.json_to, default="", help="write the result; -: on stdout")
    args = parser.parse_args()

    if args.config:
        parse_flags([f"--config={args.config}"], "", {})
    keep_compilations()
    run = load_run(args.workdir, args.checkpoint)
    data, options = run.config.data, Options.of(run.config)
    if args.data:
        options = dataclasses.replace(options, divide=bool(args.split))
    if args.data_dir:
        options = dataclasses.replace(options, data_dir=args.data_dir)
    name = args.data or data.source
    source = open_source(name, args.split or ("" if args.data else data.eval_split), options)
    if run.card.class_names is not None:
        source = with_classes(source, run.card.class_names, name, "the model")
    elif source.labels.max() >= run.card.num_classes:
        what = f"{name} has the label {source.labels.max()}, the model {run.card.num_classes} outputs"
        raise cli.UserError(what, "name the data that it was trained for")
    source = in_memory(source, options)
    parallel = all_devices(run.config)
    parallel.check_batch(data.batch_size)
    loader = make_loader(
        source,
        EvalPlan(len(source), data.batch_size),
        parallel,
        run.card.preprocessing,
        workers=data.workers,
        share=parallel.share,
        bad=BadFiles(data.on_error),
    )
    eval_step = parallel.compile(make_eval_step(run.model, loader.preprocessing, axis_name=parallel.axis_name))
    result = evaluate(eval_step, parallel.replicate(run.variables), loader)
    computed_in = said(run.config.train.precision, run.config.train.matmul_precision, parallel.devices)
    args.json({"step": run.step, "precision": computed_in, **result.record(run.card.names)})
    cli.say(f"{args.workdir} at step {run.step}: {result.summary()}{of_split(source)}; {computed_in}")


if __name__ == "__main__":
    cli.run(main)
