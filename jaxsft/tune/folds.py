"""Cross-validation: of K stratified folds of the training split each is what one run is evaluated on.

The runs lie in WORKDIR/fold-1 .. fold-K as any other. predictions.csv has each training image once, as the run that has
not seen it takes it.
"""

from __future__ import annotations

import csv
import functools
import io
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxsft import cli, storage
from jaxsft.cli import UserError
from jaxsft.data.base import Part, Source
from jaxsft.data.loader import BadFiles, make_loader
from jaxsft.data.reading import EvalPlan
from jaxsft.interpret.metrics import UNRANKED
from jaxsft.learn.steps import make_eval_step
from jaxsft.output import write_json
from jaxsft.run import workdir as workdir_module
from jaxsft.run.evaluation import Examples, evaluate_run
from jaxsft.run.parallel import all_devices
from jaxsft.run.prepare import prepare
from jaxsft.run.saved import load_run
from jaxsft.run.shared import Shared, devices_key, program_key
from jaxsft.run.training import train
from jaxsft.storage import Location
from jaxsft.tune import place
from jaxsft.tune.pool import Pool, open_pool

PREDICTIONS, RESULT = "predictions.csv", "folds.json"
COLUMNS = ("example", "name", "label", "predicted", "probability", "fold")
QUANTITIES = ("accuracy", "loss")


def cross_validate(config: ConfigDict, workdir: Location, count: int) -> dict[str, Any]:
    """Train and evaluate `count` runs, write folds.json and predictions.csv, and print a table.

    A command that was interrupted goes on where it was; a fold that is finished says so.

    Returns:
      What folds.json has: "folds", "images", and of accuracy and loss {"mean", "sd"} over the folds, the standard
      deviation of a sample (ddof=1); "runs", a list of {"fold", "workdir", "trained", "evaluated", "step", "accuracy",
      "loss"}.

    Raises:
      UserError: the config, the data or the folder do not allow it; found before anything is written.
      Stop, Preempted: as a run.
    """
    wanted = place.purpose(config, "folds", folds=count)
    place.check(workdir, wanted)
    runs = [workdir / f"fold-{number}" for number in range(1, count + 1)]
    for run in runs:
        workdir_module.check(run, config)
    pool, shared = open_pool(config, count), Shared()
    rows: list[list[Any]] = []
    with place.ours(workdir, wanted):
        for fold, run in enumerate(runs):
            train(config, run, ready=functools.partial(prepare, splits=pool.splits(fold), shared=shared))
            rows += predictions(pool, fold, run, shared)
        result = summary(pool, runs)
        storage.write_file(workdir / PREDICTIONS, table_of(sorted(rows, key=lambda row: int(row[0]))))
        write_json(workdir / RESULT, result)
    for line in lines(result):
        cli.say(line)
    cli.say(
        f"{workdir}: {PREDICTIONS} has all {len(rows)} training images, each as a run takes it that has not seen it"
    )
    return result


def predictions(pool: Pool, fold: int, run: Location, shared: Shared) -> list[list[Any]]:
    """The rows of predictions.csv of one fold: of its finished run's own file, which is made where it is missing."""
    path = run / PREDICTIONS
    if path.exists():
        with io.StringIO(path.read_text(encoding="utf-8"), newline="") as file:
            return list(csv.reader(file))[1:]
    numbers = pool.rows(fold)[1]
    found = answers(run, pool.splits(fold)[1], numbers, shared)
    names, rows = pool.source.class_names, []
    for number in numbers.tolist():
        predicted, probability = found.get(
            number, (None, None)
        )  # None: it can't be read, or the network computes no numbers
        taken_for = "" if predicted is None else name_of(names, predicted)
        surety = "" if probability is None else f"{probability:.6f}"
        label = names[pool.source.labels[number]]
        rows.append([number, pool.source.name(number), label, taken_for, surety, fold + 1])
    storage.write_file(path, table_of(rows))
    return rows


def answers(run: Location, source: Source, numbers: np.ndarray, shared: Shared) -> dict[int, tuple[int, float]]:
    """What a saved run takes each image of its fold for: number in the pool -> (class, probability)."""
    saved = load_run(run)
    parallel, batch_size = all_devices(saved.config), saved.config.data.batch_size
    dataset = shared.dataset(source.whole, parallel) if isinstance(source, Part) else None
    loader = make_loader(
        source,
        EvalPlan(len(source), batch_size),
        parallel,
        saved.card.preprocessing,
        workers=saved.config.data.workers,
        bad=BadFiles(saved.config.data.on_error),
        dataset=dataset,
    )
    step = shared.once(
        ("answers", program_key(saved.config), devices_key(parallel)),
        lambda: parallel.compile(make_eval_step(saved.model, loader.preprocessing), rows=True),
    )
    found = evaluate_run(saved, Examples(source, loader, parallel), step).answers
    example = found["example"] if isinstance(source, Part) else numbers[found["example"]]
    triples = zip(example.tolist(), found["predicted"].tolist(), found["probability"].tolist(), strict=True)
    return {number: (predicted, sure) for number, predicted, sure in triples if predicted != UNRANKED}


def name_of(names: tuple[str, ...], output: int) -> str:
    """The class of an output, which may be one more than the data have."""
    return names[output] if output < len(names) else f"output {output}"


def table_of(rows: list[list[Any]]) -> bytes:
    """Rows as CSV, under COLUMNS."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue().encode(errors="surrogateescape")


def summary(pool: Pool, runs: list[Location]) -> dict[str, Any]:
    """What the last lines of all runs' logs say; see `cross_validate`."""
    found = []
    for fold, run in enumerate(runs):
        last = workdir_module.final_record(run)
        if last is None:
            raise UserError(f"{run} is not finished", "remove it and start the command again")
        trained, evaluated = (len(rows) for rows in pool.rows(fold))
        entry = {
            "fold": fold + 1,
            "workdir": str(run),
            "trained": trained,
            "evaluated": evaluated,
            "step": last["step"],
        }
        found.append({**entry, **{name: last[name] for name in QUANTITIES}})
    return {"folds": pool.folds, "images": len(pool.source), **over(found), "runs": found}


def over(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (ddof=1) over the runs."""
    values = {name: np.array([run[name] for run in runs], np.float64) for name in QUANTITIES}
    return {name: {"mean": float(v.mean()), "sd": float(v.std(ddof=1))} for name, v in values.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """The table for people."""
    rows: list[tuple[Any, ...]] = [("fold", "trained on", "evaluated on", *QUANTITIES)]
    for run in result["runs"]:
        rows.append((run["fold"], run["trained"], run["evaluated"], f"{run['accuracy']:.4f}", f"{run['loss']:.4f}"))
    for name in ("mean", "sd"):
        rows.append((name, "", "", *(f"{result[quantity][name]:.4f}" for quantity in QUANTITIES)))
    return [f"{row[0]!s:4}" + "".join(f"  {cell!s:>12}" for cell in row[1:]) for row in rows]
