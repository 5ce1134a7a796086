"""A search for the best settings: trials, each a run of other settings, evaluated on a part of the training split."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft import config as config_module
from jaxsft.cli import Preempted, Stop, UserError
from jaxsft.run.log import NotFinite
from jaxsft.run.shared import Shared
from jaxsft.storage import Location
from jaxsft.tune import place, report
from jaxsft.tune.loop import Signals, Told, evaluations, is_out_of_memory
from jaxsft.tune.pool import Pool, open_pool
from jaxsft.tune.space import Dimension, config_of
from jaxsft.tune.study import Study, home

if TYPE_CHECKING:
    import optuna

HELD_OUT = 5  # without --folds one fold of so many is evaluated on


class Pruned(Exception):
    """The trial is worse than most were at the same time."""


def search(
    config: ConfigDict,
    recipe: str,
    workdir: Location,
    dimensions: tuple[Dimension, ...],
    trials: int,
    folds: int = 0,
) -> dict[str, Any]:
    """Make trials until the study has `trials` of them; leave trials.csv, best.py and importance.png.

    What is maximised is the accuracy on a part of the training split, at the end of the run: one stratified fold of
    HELD_OUT or, with `folds`, the mean over all of them. A trial that can't be (a loss that is not finite, no memory, a
    config that is refused) is noted with its reason, and the search goes on.

    Args:
      config: that the trials start from.
      recipe: FILE[:VARIANT] that it came from; best.py starts from it.
      workdir: of the search.
      dimensions: what the trials change.
      trials: in all processes, with those of earlier commands.
      folds: 0 or the number of folds.

    Returns:
      {"best": number of the trial or None, "accuracy", "config" (what it changes), "trials": a row for each}.

    Raises:
      UserError: Optuna is not installed; the data or the folder do not allow it.
      Preempted: a signal came.
      Stop: no trial came to its end.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("Optuna is not installed", "install the extra: pip install 'jaxsft[search]'")
    space = {one.key: one.record() for one in dimensions}
    wanted = place.purpose(config, "space", folds=folds, space=space)
    place.check(workdir, wanted)
    used = range(folds) if folds else (0,)
    pool = open_pool(config, folds or HELD_OUT, used)
    with home(workdir) as (folder, send):
        place.begin(workdir, wanted)
        study = Study(folder, dimensions, config.seed)
        shared = Shared()
        with Signals() as signals:
            while (trial := study.begin(trials)) is not None:
                attempt(study, trial, config_of(config, dimensions, trial.params), pool, used, shared, signals)
                send()
                report.write(study.study, workdir, recipe, config, dimensions)
        return report.tell(study.study, workdir, recipe, config, dimensions)


def attempt(
    study: Study,
    trial: optuna.Trial,
    config: ConfigDict,
    pool: Pool,
    used: Sequence[int],
    shared: Shared,
    signals: Signals,
) -> None:
    """Make a trial and tell the study how it went. Raises Preempted, and what is no fault of the trial."""
    began = time.perf_counter()

    def between() -> None:
        study.beat(trial)
        signals.poll()

    try:
        signals.poll()
        study.complete(trial, accuracy_of(config, pool, used, shared, between, lambda *seen: judge(trial, *seen)))
    except Pruned:
        study.prune(trial)
    except Told as told:
        study.lose(trial.number, f"ended by {told}")
        raise Preempted(told.number, f"in trial {trial.number}, which is lost", "the same command goes on") from None
    except NotFinite as found:
        study.fail(trial, str(found))
    except Stop as stop:
        study.fail(trial, str(stop))
    except Exception as error:
        if not is_out_of_memory(error):
            study.fail(trial, f"{type(error).__name__}: {error}")
            raise
        study.fail(trial, "out of memory")
    cli.say(report.line(study.study.trials[trial.number], time.perf_counter() - began))


def judge(trial: optuna.Trial, number: int, accuracy: float) -> None:
    """Report the `number`-th intermediate accuracy of a trial. Raises Pruned where that is too little."""
    trial.report(accuracy, number)
    if trial.should_prune():
        raise Pruned


def accuracy_of(
    config: ConfigDict,
    pool: Pool,
    used: Sequence[int],
    shared: Shared,
    between: Callable[[], None],
    judged: Callable[[int, float], None],
) -> float:
    """The accuracy at the end of a run, on the fold that is `used`, or the mean of the runs of several.

    `judged` is called with the number (from 1) and the accuracy of each evaluation of the one run; of several with each
    fold's number and the mean so far. It may raise, and so may `between`, after each update.
    """
    config_module.check(config)
    finals: list[float] = []
    for fold in used:
        for number, result in enumerate(evaluations(config, pool.splits(fold), shared, between), 1):
            last = result.accuracy
            if len(used) == 1:
                judged(number, last)
        finals.append(last)
        if len(used) > 1:
            judged(len(finals), sum(finals) / len(finals))
    return sum(finals) / len(finals)
