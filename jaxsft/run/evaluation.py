"""The loop of an evaluation: every batch through the compiled step, its counts summed."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxsft.data.base import Source
from jaxsft.data.loader import Loader
from jaxsft.interpret.metrics import Evaluation
from jaxsft.run.parallel import IN_FLIGHT


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

    def counts() -> Iterator[dict[str, Any]]:
        queue: collections.deque[Any] = collections.deque()
        for batch in loader.batches():
            queue.append(eval_step(variables, loader.dataset, batch))
            between()
            if len(queue) > IN_FLIGHT:
                yield jax.device_get(queue.popleft())
        yield from map(jax.device_get, queue)

    return Evaluation.of(counts())


def of_split(source: Source) -> str:
    """What its split is called, in brackets, where it has a name."""
    return f" ({source.split})" if source.split else ""
