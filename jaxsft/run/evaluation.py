"""Evaluation: every batch of a set through a compiled step; and the set that a saved run is evaluated on."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxsft.cli import UserError
from jaxsft.data.base import Options, Source
from jaxsft.data.loader import BadFiles, Loader, make_loader
from jaxsft.data.reading import EvalPlan, in_memory
from jaxsft.data.sources import open_source, with_classes
from jaxsft.data.views import Views
from jaxsft.interpret import predictions
from jaxsft.interpret.metrics import Evaluation
from jaxsft.interpret.multilabel import MultiLabelEvaluation, Result
from jaxsft.learn.steps import make_eval_step
from jaxsft.models.weights import ModelCard
from jaxsft.run import labelling
from jaxsft.run.parallel import IN_FLIGHT, DataParallel, all_devices
from jaxsft.run.saved import Run
from jaxsft.storage import Location

WIDE = ("logits", "classes", "probabilities")  # of one label an image: what grows with the classes


class Examples(NamedTuple):
    """What a saved run is evaluated on, and the devices that do it."""

    source: Source
    loader: Loader
    parallel: DataParallel
    views: Views | None = None  # of each image, where they are several
    left_out: Mapping[str, str] = MappingProxyType({})  # what can't be read: file -> reason; it fills as one evaluates


def evaluate(
    eval_step: Callable[..., Any],
    variables: Any,
    loader: Loader,
    card: ModelCard,
    between: Callable[[], None] = lambda: None,
    see: Callable[[Mapping[str, Any]], None] | None = None,
) -> Result:
    """Run the compiled `eval_step` over all that `loader` brings and make the metrics of it, of one label or several.

    After each batch `between` is called; it may raise to end the evaluation. `see` is shown the answers about each
    batch, before those are dropped that the metrics do not need: what grows with examples times classes.
    """
    kind: type[Evaluation | MultiLabelEvaluation] = MultiLabelEvaluation if card.multi_label else Evaluation
    wide = () if card.multi_label else WIDE

    def narrowed() -> Iterator[dict[str, Any]]:
        for batch in results(eval_step, variables, loader, between):
            if see is not None:
                see(batch)
            yield {name: value for name, value in batch.items() if name not in wide}

    return kind.of(narrowed(), card.num_classes, card.names)


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
            yield loader.devices.join(queue.popleft())
    yield from map(loader.devices.join, queue)


def open_examples(run: Run, data: str = "", split: str = "", data_dir: str = "", tta: str = "") -> Examples:
    """The images that `run` was evaluated on, or others.

    Args:
      run: whose model, batch size and loader.
      data: another source than the run's; without splits of its own all of it counts.
      split: another one; '': the run's eval_split, and of another source the one that is for evaluating.
      data_dir: of TFDS; '': the run's.
      tta: which views of each image are averaged over: 'flip', 'crops' or 'flip+crops'; '': it is seen once.

    Raises:
      UserError: they can't be had, have a class that the model lacks, or other kinds of labels, one or several.
    """
    views = Views.of(tta, run.card.preprocessing)
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
    elif source.multi_label and len(source.class_names) != run.card.num_classes:
        what = f"{name} has {len(source.class_names)} classes, the model {run.card.num_classes} outputs"
        raise UserError(what, "name the data that it was trained for")
    elif not source.multi_label and source.labels.max() >= run.card.num_classes:
        what = f"{name} has the label {source.labels.max()}, the model {run.card.num_classes} outputs"
        raise UserError(what, "name the data that it was trained for")
    source = in_memory(source, options)
    parallel = all_devices(run.config)
    parallel.check_batch(batch_size)
    bad = BadFiles(run.config.data.on_error)
    loader = make_loader(
        source,
        EvalPlan(len(source), batch_size),
        parallel,
        run.card.preprocessing if views is None else views.prepared(run.card.preprocessing),
        workers=run.config.data.workers,
        share=parallel.share,
        bad=bad,
        cache="" if data else run.config.data.cache,
    )
    return Examples(source, loader, parallel, views, bad.found)


def step_of(run: Run, examples: Examples, *, logits: bool = False, top: int = 0) -> Callable[..., Any]:
    """The compiled step that evaluates a saved run on `examples`; see `make_eval_step`."""
    _, loader, parallel, views, _ = examples
    size, of_view = run.card.preprocessing.crop_size, None
    if views is not None:
        of_view = lambda images, number: views.one(images, size, number)
    body = make_eval_step(
        run.model,
        loader.preprocessing,
        logits=logits,
        top=top,
        temperature=run.card.temperature,
        views=of_view,
        number_of_views=1 if views is None else len(views),
    )
    return parallel.compile(body, rows=True)


def evaluate_run(
    run: Run,
    examples: Examples,
    step: Callable[..., Any] | None = None,
    see: Callable[[Mapping[str, Any]], None] | None = None,
) -> Result:
    """The metrics of a saved run on all of `examples`, whose workers end.

    Args:
      run: whose model, and whose temperature.
      examples: without those that can't be read.
      step: `step_of`'s, compiled for them already.
      see: as for `evaluate`.

    Raises:
      UserError: none of them can be read.
    """
    if step is None:
        step = step_of(run, examples)
    loader = examples.loader
    try:
        result = evaluate(step, examples.parallel.replicate(run.variables), loader, run.card, see=see)
    finally:
        loader.close()
    if not result.count:
        first = ": ".join(next(iter(examples.left_out.items()), ("", "")))
        raise UserError(f"none of {len(examples.source)} images can be read, such as {first}", "name others")
    return result


def evaluate_into(
    run: Run,
    examples: Examples,
    table: Location | None,
    see: Callable[[Mapping[str, Any]], None] | None = None,
) -> Result:
    """`evaluate_run`, and where there is to be a file `table` a row for each example in it; see `predictions.table`.

    `see` is shown the answers about each batch, the "logits" among them.
    """
    top = predictions.top_of(run.card.num_classes) if table is not None else 0
    step = step_of(run, examples, logits=see is not None, top=top)
    if table is None:
        return evaluate_run(run, examples, step, see)
    with predictions.table(table, examples.source, names_of(run, examples.source)) as write:

        def both(batch: Mapping[str, Any]) -> None:
            write(batch)
            if see is not None:
                see(batch)

        return evaluate_run(run, examples, step, both)


def names_of(run: Run, source: Source) -> tuple[str, ...]:
    """What to call the outputs of a run's model, on data that may have names where the run has numbers."""
    return (*source.class_names, *run.card.names[len(source.class_names) :])


def of_split(source: Source) -> str:
    """What its split is called, in brackets, where it has a name."""
    return f" ({source.split})" if source.split else ""
