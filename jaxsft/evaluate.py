"""Evaluate a finished or running run: every example once.

python -m jaxsft.evaluate --workdir DIR [--data SOURCE --split SPLIT] [--data-dir DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxsft import cli
from jaxsft.data.order import evaluation_batches
from jaxsft.data.sources import Source, open_source
from jaxsft.metrics import Evaluation
from jaxsft.parallel import DataParallel
from jaxsft.steps import Dataset, make_eval_step
from jaxsft.workdir import load_run


def resident(source: Source, parallel: DataParallel) -> Dataset:
    """The images and labels of a source on every device."""
    return parallel.replicate({"images": source.images, "labels": source.labels})


def evaluate(
    eval_step: Callable[..., Any], variables: Any, dataset: Dataset, batch_size: int, parallel: DataParallel
) -> Evaluation:
    """Run the compiled `eval_step` over the whole data set and sum its counts.

    The next batches are dispatched while the counts of the last ones are on their way to the host.
    """
    counts = [
        eval_step(variables, dataset, parallel.split({"example": index, "mask": mask}))
        for index, mask in evaluation_batches(len(dataset["labels"]), batch_size)
    ]
    return Evaluation.of(jax.device_get(counts))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jaxsft.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--data", default="", help="another source than the run's, such as tfds:cifar10")
    parser.add_argument("--split", default="", help="another split than the run's eval_split")
    parser.add_argument("--data-dir", default="", help="of TFDS")
    parser.add_argument("--json", type=Path, help="write the result, per class and confusion too")
    args = parser.parse_args()

    run = load_run(args.workdir)
    data = run.config.data
    source = open_source(args.data or data.source, args.split or data.eval_split, args.data_dir or data.data_dir)
    names = run.card.class_names
    if names is not None and source.class_names != names:
        raise cli.UserError(
            f"the classes of the data ({', '.join(source.class_names[:3])} ...) are not the model's"
            f" ({', '.join(names[:3])} ...)",
            "evaluate on data with the same classes",
        )
    parallel = DataParallel(run.config.parallel.backend)
    parallel.check_batch(data.batch_size)
    eval_step = parallel.compile(make_eval_step(run.model, run.card.preprocessing, axis_name=parallel.axis_name))
    dataset = resident(source, parallel)
    result = evaluate(eval_step, parallel.replicate(run.variables), dataset, data.batch_size, parallel)
    if args.json:
        cli.write_json(args.json, {"step": run.step, **result.record(source.class_names)})
    print(f"{args.workdir} at step {run.step}: {result.summary()}")


if __name__ == "__main__":
    cli.run(main)
