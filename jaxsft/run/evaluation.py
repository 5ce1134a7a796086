"""Evaluation: every batch of a set through a compiled step; and the set that a saved run is evaluated on."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxsft.cli import UserError
from jaxsft.data.base import Options, Source
from jaxsft.data.loader import BadFiles, Loader, make_loader
from jaxsft.data.reading import EvalPlan, in_memory
from jaxsft.data.sources import open_source, with_classes
from jaxsft.interpret.metrics import Evaluation
from jaxsft.interpret.multilabel import MultiLabelEvaluation, Result
from jaxsft.learn.steps import make_eval_step
from jaxsft.models.weights import ModelCard
from jaxsft.run import labelling
from jaxsft.run.parallel import IN_FLIGHT, DataParallel, all_devices
from jaxsft.run.saved import Run


class Examples(NamedTuple):
    """What a saved run is evaluated on, and the devices that do it."""

    source: Source
    loader: Loader
    parallel: DataParallel


def evaluate(
    eval_step: Callable[..., Any],
    variables: Any,
    loader: Loader,
    card: ModelCard,
    between: Callable[[], None] = lambda: None,
) -> Result:
    """Run the compiled `eval_step` over all that `loader` brings and make the metrics of it, of one label or several.

    After each batch `between` is called; it may raise to end the evaluation.
    """
    kind = MultiLabelEvaluation if card.multi_label else Evaluation
    return kind.of(results(eval_step, variables, loader, between), card.num_classes)


def results(
    step: Callable[..., Any], variables: Any, loader: Loader, between: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """What the compiled `step` makes of each batch, on the host.

    The next batches are dispatched while the results of the last ones are on their way.
    """
    queue: collections.deque[Any] = collections.deque()
    for batch in loader.batches():
        queue.append(step(variables, loader.dataset, batch))
        between()
        if len(queue) > IN_FLIGHT:
            yield jax.device_get(queue.popleft())
    yield from map(jax.device_get, queue)


def open_examples(run: Run, data: str = "", split: str = "", data_dir: str = "") -> Examples:
    """The images that `run` was evaluated on, or others.

    Args:
      run: whose model, batch size and loader.
      data: another source than the run's; without splits of its own all of it counts.
      split: another one; '': the run's eval_split, and of another source the one that is for evaluating.
      data_dir: of TFDS; '': the run's.

    Raises:
      UserError: they can't be had, have a class that the model lacks, or other kinds of labels, one or several.
    """
    options = Options.of(run.config)
    if data:
        options = dataclasses.replace(options, divide=bool(split))
    if data_dir:
        options = dataclasses.replace(options, data_dir=data_dir)
    name, batch_size = data or run.config.data.source, run.config.data.batch_size
    source = open_source(name, split or ("" if data else run.config.data.eval_split), options)
    labelling.check_kind(source, name, run.card)
    if run.card.class_names is not None:
        source = with_classes(source, run.card.class_names, name, "the model")
    elif source.labels.max() >= run.card.num_classes:
        what = f"{name} has the label {source.labels.max()}, the model {run.card.num_classes} outputs"
        raise UserError(what, "name the data that it was trained for")
    source = in_memory(source, options)
    parallel = all_devices(run.config)
    parallel.check_batch(batch_size)
    loader = make_loader(
        source,
        EvalPlan(len(source), batch_size),
        parallel,
        run.card.preprocessing,
        workers=run.config.data.workers,
        share=parallel.share,
        bad=BadFiles(run.config.data.on_error),
    )
    return Examples(source, loader, parallel)


def evaluate_run(run: Run, examples: Examples, step: Callable[..., Any] | None = None) -> Result:
    """The metrics of a saved run on all of `examples`, whose workers end.

    Args:
      run: whose model.
      examples: without those that can't be read.
      step: `make_eval_step`'s, compiled for them already.
    """
    _, loader, parallel = examples
    if step is None:
        step = parallel.compile(make_eval_step(run.model, loader.preprocessing, axis_name=parallel.axis_name))
    try:
        return evaluate(step, parallel.replicate(run.variables), loader, run.card)
    finally:
        loader.close()


def of_split(source: Source) -> str:
    """What its split is called, in brackets, where it has a name."""
    return f" ({source.split})" if source.split else ""
