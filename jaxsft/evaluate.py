"""Evaluate a finished or running run: every example once.

python -m jaxsft.evaluate --workdir DIR [--data SOURCE --split SPLIT] [--data-dir DIR] [--json FILE]

A source that a config file registers is known once that file is loaded: --config FILE.
"""

from __future__ import annotations

from jaxsft import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxsft import cli
from jaxsft.data.base import Options
from jaxsft.data.loader import BadFiles, Loader, make_loader
from jaxsft.data.reading import EvalPlan, in_memory
from jaxsft.data.sources import open_source, with_classes
from jaxsft.flags import parse_flags
from jaxsft.log import IN_FLIGHT
from jaxsft.metrics import Evaluation
from jaxsft.parallel import all_devices
from jaxsft.steps import make_eval_step
from jaxsft.workdir import load_run


def evaluate(
    eval_step: Callable[..., Any],
    variables: Any,
    loader: Loader,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run the compiled `eval_step` over all that `loader` brings and sum its counts.

    The next batches are dispatched while the counts of the last ones are on their way to the host. After each one
    `between` is called; it may raise to end the evaluation.
    """
    counts: list[Any] = []
    for batch in loader.batches():
        counts.append(eval_step(variables, loader.dataset, batch))
        if len(counts) > IN_FLIGHT:
            jax.block_until_ready(counts[-1 - IN_FLIGHT])  # not further ahead: `between` is to be heard in time
        between()
    return Evaluation.of(jax.device_get(counts))


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--data", default="", help="another source than the run's, such as tfds:cifar10")
    parser.add_argument("--split", default="", help="another split than the run's eval_split")
    parser.add_argument("--data-dir", default="", help="of TFDS")
    parser.add_argument("--config", default="", help="a config file that registers the source")
    parser.add_argument("--json", type=Path, help="write the result, per class and confusion too")
    args = parser.parse_args()

    if args.config:
        parse_flags([f"--config={args.config}"], "", {})
    run = load_run(args.workdir)
    data, options = run.config.data, Options.of(run.config)
    if args.data_dir:
        options = dataclasses.replace(options, data_dir=args.data_dir)
    name = args.data or data.source
    source = open_source(name, args.split or ("" if args.data else data.eval_split), options)
    if run.card.class_names is not None:
        source = with_classes(source, run.card.class_names, name, "the model")
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
    if args.json:
        cli.write_json(args.json, {"step": run.step, **result.record(run.card.names)})
    print(f"{args.workdir} at step {run.step}: {result.summary()}")


if __name__ == "__main__":
    cli.run(main)
