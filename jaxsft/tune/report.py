"""What a search leaves for people: trials.csv, importance.png, best.py; and its table on the screen."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from jaxsft import cli, recipes, storage
from jaxsft.cli import Stop
from jaxsft.config import flatten
from jaxsft.storage import Location
from jaxsft.tune.pictures import importances, save
from jaxsft.tune.space import Dimension, config_of

if TYPE_CHECKING:
    import optuna

TRIALS, BEST, IMPORTANCE = "trials.csv", "best.py", "importance.png"
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


def state_of(trial: Any) -> str:
    """A trial's state in a word."""
    return "lost" if "lost" in trial.user_attrs else STATES[trial.state.name]


def line(trial: Any, seconds: float) -> str:
    """What is said at the end of a trial."""
    value = f" {trial.value:.4f}" if trial.value is not None else ""
    reason = f": {trial.user_attrs['reason']}" if "reason" in trial.user_attrs else ""
    params = ", ".join(f"{key} {shown(value)}" for key, value in trial.params.items())
    return f"trial {trial.number}: {state_of(trial)}{value}, {seconds:.1f} s; {params}{reason}"


def shown(value: Any) -> str:
    """A value of a setting for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """A row for each trial: "number", "state", "value", its params, "seconds", "reason"."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        seconds = round(trial.duration.total_seconds(), 2) if trial.duration else None
        begin = {"number": trial.number, "state": state_of(trial), "value": trial.value}
        found.append({**begin, **trial.params, "seconds": seconds, "reason": trial.user_attrs.get("reason", "")})
    return found


def best_of(study: optuna.Study) -> Any:
    """The finished trial of the highest value, the first of equals; None where there is none."""
    done = [trial for trial in study.get_trials(deepcopy=False) if state_of(trial) == "complete"]
    return max(done, key=lambda trial: (trial.value, -trial.number), default=None)


def write(
    study: optuna.Study, workdir: Location, recipe: str, config: ConfigDict, dimensions: tuple[Dimension, ...]
) -> None:
    """Write trials.csv and best.py as they are now."""
    found = rows(study)
    columns = ["number", "state", "value", *(one.key for one in dimensions), "seconds", "reason"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    storage.write_file(workdir / TRIALS, text.getvalue().encode())
    best = best_of(study)
    if best is not None:
        own = config_of(config, dimensions, best.params)
        what = f"The best of {len(found)} trials: number {best.number}, accuracy {best.value:.4f}"
        storage.write_file(workdir / BEST, program(what, workdir / BEST, recipe, own).encode())


def program(what: str, path: Location, recipe: str, config: ConfigDict) -> str:
    """A config file that gives `config`: that of the recipe with what differs from it."""
    start = recipe_from_anywhere(recipe)
    before, now = (flatten(one.to_dict()) for one in (recipes.load(recipe), config))
    changes = [f"    config.{key} = {now[key]!r}" for key in now if now[key] != before[key]]
    head = (f"{what} on a part of the training split.", f"python3 -m jaxsft.train --config {path}")
    comment = "".join(f"# {cli.printable(text)}\n" for text in head)
    body = ["def get_config() -> ConfigDict:", '    """The recipe with what the search has found."""']
    body += [f"    config = recipes.load({start!r})", *changes, "    return config"]
    return (
        f"{comment}\nfrom ml_collections import ConfigDict\n\nfrom jaxsft import recipes\n\n\n" + "\n".join(body) + "\n"
    )


def recipe_from_anywhere(recipe: str) -> str:
    """FILE[:VARIANT] that means the same in every folder: of a file its whole path, of one that ships its name."""
    file, colon, variant = recipe.partition(":")
    path = recipes.find(cli.local_path(file))
    name = path.stem if path.parent.resolve() == recipes.shipped().resolve() else str(path.resolve())
    return f"{name}{colon}{variant}"


def tell(
    study: optuna.Study, workdir: Location, recipe: str, config: ConfigDict, dimensions: tuple[Dimension, ...]
) -> dict[str, Any]:
    """Write all files, print the table, and return what `search` does. Raises Stop where no trial is complete."""
    write(study, workdir, recipe, config, dimensions)
    found = rows(study)
    keys = [one.key for one in dimensions]
    table = [["trial", "state", "accuracy", *keys, "seconds"]]
    for row in found:
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        table.append([str(row["number"]), row["state"], value, *(shown(row.get(key, "")) for key in keys), seconds])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for cells in table:
        cli.say("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    for row in found:
        if row["state"] == "running":
            cli.say(f"trial {row['number']} is still running in another process")
    best = best_of(study)
    if best is None:
        raise Stop("no trial came to its end", f"see why in {workdir / TRIALS}")
    draw(study, workdir)
    changes = {one.key: one.meant(best.params[one.key]) for one in dimensions}
    path = workdir / BEST
    how = (
        f"python3 -m jaxsft.train --config {path}" if isinstance(path, Path) else f"{path}, copied here, is its config"
    )
    cli.say(f"best: trial {best.number}, accuracy {best.value:.4f}; {how}")
    return {"best": best.number, "accuracy": best.value, "config": changes, "trials": found}


def draw(study: optuna.Study, workdir: Location) -> None:
    """Write importance.png: of each key by PED-ANOVA (arXiv:2304.10255). With too few trials there is none."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    try:
        with warnings.catch_warnings(action="error", category=UserWarning):  # it says so where they are too few
            found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError, UserWarning):
        return
    if found:
        save(importances(found, "accuracy"), workdir / IMPORTANCE)
