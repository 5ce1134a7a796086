"""A run's images as an exported program takes them: those that calibrate it, and those that show how right it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxsft.data.augment import preprocess
from jaxsft.data.loader import BadFiles, make_loader
from jaxsft.data.reading import EvalPlan
from jaxsft.data.sources import open_training
from jaxsft.interpret.metrics import Evaluation
from jaxsft.interpret.multilabel import MultiLabelEvaluation, Result
from jaxsft.learn.objective import gather
from jaxsft.learn.steps import make_eval_step
from jaxsft.models.weights import Preprocessing
from jaxsft.run.evaluation import Examples, results
from jaxsft.run.parallel import all_devices
from jaxsft.run.saved import Run

Program = Callable[[np.ndarray], np.ndarray]  # float32 [B, S, S, 3] in 0..255, as `batches` gives -> logits [B, K]


class Given:
    """A model of logits that are there already: its input is its output."""

    @staticmethod
    def apply(variables: Any, images: jax.Array, train: bool) -> jax.Array:
        """As a Flax module's."""
        return images


def training_examples(run: Run, count: int) -> Examples:
    """`count` of the images that `run` was trained on, or all where it has fewer, evenly spread over them.

    Raises:
      UserError: they can't be had.
    """
    source = open_training(run.config)
    taken = min(count, len(source))
    source = source.select(np.arange(taken) * len(source) // taken)
    parallel, config = all_devices(run.config), run.config
    loader = make_loader(
        source,
        EvalPlan(taken, config.data.batch_size),
        parallel,
        run.card.preprocessing,
        workers=config.data.workers,
        bad=BadFiles(config.data.on_error),
    )
    return Examples(source, loader, parallel)


def batches(examples: Examples) -> Iterator[dict[str, np.ndarray]]:
    """All of `examples`, whose workers end, as the model sees them before they are normalised.

    Yields:
      "image" float32 [B, S, S, 3] in 0..255, S the model's side, "label" as the source has it, "mask" bool [B], False
      where the last batch is padded or an image is broken.
    """
    loader, parallel = examples.loader, examples.parallel
    to = unnormalised(loader.preprocessing)

    def step(variables: Any, dataset: Any, batch: Any) -> dict[str, jax.Array]:
        batch = gather(dataset, batch)
        return {"image": preprocess(batch["image"], to), **{name: batch[name] for name in ("label", "mask")}}

    try:
        yield from results(parallel.compile(step, rows=True), {}, loader)
    finally:
        loader.close()


def unnormalised(preprocessing: Preprocessing) -> Preprocessing:
    """The same without its mean and deviation: what it makes of images stays in 0..255."""
    return dataclasses.replace(preprocessing, mean=(0.0,) * 3, std=(1 / 255,) * 3)


def evaluate_programs(programs: Mapping[str, Program], examples: Examples, multi_label: bool) -> dict[str, Result]:
    """The metrics of programs, exported ones or not, on all of `examples`, which are gone through once."""
    logits: dict[str, list[np.ndarray]] = {name: [] for name in programs}
    labels = []
    for batch in batches(examples):
        labels.append(batch["label"][batch["mask"]])
        for name, program in programs.items():
            logits[name].append(program(batch["image"])[batch["mask"]])
    kind = MultiLabelEvaluation if multi_label else Evaluation
    step = jax.jit(make_eval_step(Given(), None))

    def answers(of: list[np.ndarray]) -> Iterator[dict[str, Any]]:
        for rows, own in zip(of, labels, strict=True):
            numbers = {"example": np.arange(len(own), dtype=np.int32), "mask": np.ones(len(own), bool)}
            yield jax.device_get(step({}, {}, {"image": rows, "label": own, **numbers}))

    return {name: kind.of(answers(of), of[0].shape[1]) for name, of in logits.items()}
