"""`python -m jaxsft.train` that sends itself a signal at a chosen moment.

python -m tests.victim MOMENT COUNT MS SIGNAL ARGUMENTS...

MOMENT is 'features', 'compilation', 'step', 'evaluation' or 'checkpoint'; the signal comes MS milliseconds after the
COUNT-th of them has begun, so that it falls into its middle, wherever that is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from jaxsft import cli, train
from jaxsft.run import checkpoint, features, job, training

MOMENTS: dict[str, tuple[Any, str]] = {
    "features": (features.Keeper, "features"),
    "compilation": (job.Job, "compile_ahead"),
    "step": (job.Job, "update"),
    "evaluation": (training.Trainer, "evaluate"),
    "checkpoint": (checkpoint.Checkpoints, "save"),
}


def arm(moment: str, count: int, milliseconds: float, number: int) -> None:
    """Send the signal `number` so long after the `count`-th `moment` has begun."""
    owner, name = MOMENTS[moment]
    original, calls = getattr(owner, name), 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            timer = threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        return original(*args, **kwargs)

    setattr(owner, name, watched)


if __name__ == "__main__":
    moment, count, milliseconds, name, *arguments = sys.argv[1:]
    arm(moment, int(count), float(milliseconds), signal.Signals[name])
    sys.argv = ["jaxsft.train", *arguments]
    cli.run(train.main)
