"""What was trained, on what, with which settings: the parts of a report that need no evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxsft.interpret.report import charts, lines
from jaxsft.interpret.report.lines import Points, points_of
from jaxsft.interpret.report.page import Html, Section, escape, joined, paragraph
from jaxsft.interpret.report.reported import CALLED, Reported
from jaxsft.interpret.report.tables import facts, folded, table

SHOWN_SHA = 12  # hex digits
LIBRARIES = "versions"
TRAIN, EVAL = 0, 1  # colours


def tiles(run: Reported) -> Html:
    """The numbers that one looks for first."""
    found = [(name, amount(key, value)) for key, (name, value) in run.metrics().items()]
    if (seconds := run.seconds()) is not None:
        found.append(("trained for", duration(seconds)))
    if (speed := run.speed()) is not None:
        found.append(("images a second", f"{speed:,.0f}"))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in found)
    return Html(f'<dl class="tiles">{cells}</dl>')


def amount(key: str, value: float) -> str:
    """A metric for people: a loss as it is, shares as percent."""
    return f"{value:.4f}" if key.endswith("loss") else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """A time for people: '0:42 min', '3:05 h'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def state(run: Reported) -> str:
    """How far a run has come."""
    epochs = run.records[-1].get("epoch") if run.records else None
    if run.is_finished:
        return f"finished after {epochs:g} epochs, {run.records[-1]['step']} steps"
    if not isinstance(epochs, int | float):
        return "begun, nothing logged yet"
    planned = run.config.train.epochs
    whole = f" of {planned:g}" if run.config.train.steps is None else f", step {run.records[-1]['step']}"
    return f"not finished: at epoch {epochs:.3g}{whole}"


def summary(run: Reported) -> list[tuple[str, Any]]:
    """What was trained, from what, on what."""
    card, p, data = run.card, run.card.preprocessing, run.config.data
    size = f"short side {p.resize_size} px ({p.interpolation})"
    trained, total = run.sizes
    last = run.starts[-1] if run.starts else {}
    return [
        ("state", state(run)),
        ("lies in", run.place),
        ("model", f"{card.arch}, {card.num_classes} classes{', any number of them an image' * card.multi_label}"),
        ("parameters", f"{total:,}, of which {trained:,} train" if total else ""),
        ("weights", f"{card.source} {card.weights_version}".strip() or "from scratch"),
        ("sha256 of the weights", card.sha256),
        ("input", f"{size}, middle {p.crop_size} px, mean {p.mean}, deviation {p.std}"),
        ("data", data.source),
        *((f"images {name}", of_split(run.data.get(part))) for part, name in SPLITS.items()),
        ("images left out", f"{run.left_out}, named in bad_files.txt" if run.left_out else ""),
        ("evaluated", evaluated(run)),
        ("computed in", run.precision),
        ("computed on", last.get("devices", "")),
        ("seed", str(run.config.seed)),
    ]


SPLITS = {"train": "to train on", "eval": "to evaluate on", "unlabelled": "without labels"}


def of_split(entry: Any) -> str:
    """How many images a split has, and the beginning of their checksum."""
    if not isinstance(entry, Mapping):
        return ""
    return f"{entry.get('images', '?')}, sha256 {str(entry.get('sha256', '?'))[:SHOWN_SHA]}…"


def evaluated(run: Reported) -> str:
    """Which checkpoint was evaluated, on how many images."""
    if run.result is None:
        return run.missing
    return f"the checkpoint of step {run.step}, on {run.result.count} images{run.evaluated_on}"


def about(run: Reported) -> Section:
    """The facts of a run."""
    return Section("about", "About this run", facts("About this run", summary(run)))


def curves(run: Reported) -> Section:
    """Loss, metrics, rate and speed over the epochs."""
    log, other = list(map(dict, run.records)), training_loss(run.config, run.card.multi_label)
    train = f"training, with {other}" if other else "training"

    def both(title: str, quantity: str, name: str, share: bool) -> charts.Chart | None:
        series = [Points(name, points_of(log, "train", quantity), TRAIN, 1),
                  Points("evaluation", points_of(log, "eval", quantity), EVAL, 0)]  # fmt: skip
        return lines.curves(title, title.lower(), series, share=share)

    several = [
        Points(CALLED[key], points_of(log, "eval", key), k, k) for k, key in enumerate(("map", "f1_micro", "f1_macro"))
    ]
    found = [
        both("Loss", "loss", train, False),
        both("All labels right" if run.card.multi_label else "Accuracy", "accuracy", "training", True),
        lines.curves("Evaluation of several labels", "share", several, share=True),
        lines.curves("Learning rate", "rate", [Points("rate", points_of(log, "train", "lr"), 2)], form=".3~g"),
        lines.curves(
            "Speed", "images a second", [Points("speed", points_of(log, "train", "images_per_sec"), 3)], form=",.0f"
        ),
        lines.curves(
            "Unlabelled images that are taught from", "share",
            [Points("share", points_of(log, "train", "confident"), 4)], share=True,
        ),
    ]  # fmt: skip
    shown = [charts.html(one) for one in found if one is not None]
    body = Html(f'<div class="charts">{joined(shown)}</div>') if shown else paragraph("Nothing is logged yet.", "note")
    return Section("curves", "Curves", body)


def training_loss(config: ConfigDict, multi_label: bool = False) -> str:
    """What the loss of training is, where it is not the plain one that evaluation has; else ''.

    That is cross-entropy, of several labels an image binary cross-entropy.
    """
    train = config.train
    names = {"bce": "binary cross-entropy", "focal": f"focal loss of gamma {train.focal_gamma:g}"}
    is_other = train.loss != ("bce" if multi_label else "cross_entropy")
    parts = {"label smoothing": train.label_smoothing, "mixup": train.mixup, "cutmix": train.cutmix}
    said = [f"{name} {value:g}" for name, value in parts.items() if value]
    loss = [names.get(train.loss, "cross-entropy")] if is_other else []
    return ", ".join([*loss, *said, *(["class weights"] if len(train.class_weights) else [])])


def parameters(run: Reported) -> Section:
    """How each parameter is trained."""
    columns, *rows = run.parameters or ((),)
    if not rows:
        return Section("parameters", "Parameters", paragraph("They are not known.", "note"))
    trained, total = run.sizes
    body = table("Parameters", columns, rows, hidden_caption=True)
    shares = f"{trained:,} of {total:,} numbers train, in {len(rows)} arrays. The rate is the highest of the schedule."
    return Section("parameters", "Parameters", joined([paragraph(shares), folded(f"All {len(rows)} arrays", body)]))


def settings(run: Reported) -> Section:
    """The config: what differs from the defaults, and all of it."""
    rows = [(key, shown(value)) for key, value in run.changed.items()]
    changed = table("Settings that differ from their defaults", ("setting", "value"), rows)
    lines = json.dumps(run.config.to_dict(), indent=2).split("\n")
    whole = Html(f'<pre tabindex="0">{joined(lines)}</pre>')
    return Section("config", "Config", joined([changed, folded("The whole config.json", whole)]))


def shown(value: Any) -> str:
    """A setting's value as it is typed."""
    return json.dumps(value) if not isinstance(value, str) else value or '""'


def machines(run: Reported) -> Section:
    """Where each start of the run computed, and with which versions."""
    if not run.starts:
        return Section("machine", "Machine and versions", paragraph("They were not noted by this run.", "note"))
    return Section("machine", "Machine and versions", facts_of_starts(run.starts))


WHERE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "from step": lambda start: str(start.get("step", "")),
    "begun at": lambda start: moment(start.get("time")),
    "devices": lambda start: str(start.get("devices", "")),
    "computed in": lambda start: str(start.get("precision", "")),
    "host": lambda start: str(start.get("host", "")),
    "processor": lambda start: ", ".join(filter(None, (str(start.get("cpu", "")), cores(start.get("cores"))))),
    "memory": lambda start: f"{start['memory_gib']:.0f} GiB" if isinstance(start.get("memory_gib"), float) else "",
    "system": lambda start: str(start.get("system", "")),
    "commit": lambda start: str(start.get("commit", "")),
}


def facts_of_starts(starts: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> Html:
    """A column for each start, which has a name or a number."""
    libraries = dict.fromkeys(name for start in starts for name in start.get(LIBRARIES, {}))
    read = WHERE | {name: lambda start, n=name: str(start.get(LIBRARIES, {}).get(n, "")) for name in libraries}
    rows = [(name, *map(value, starts)) for name, value in read.items()]
    if not names:
        names = [f"start {number}" for number in range(1, len(starts) + 1)] if len(starts) > 1 else [""]
    kept = [row for row in rows if any(row[1:])]
    return table("Machine and versions", ("", *names), kept, hidden_caption=True)


def cores(count: Any) -> str:
    """How many cores, where it is known."""
    return f"{count} cores" if isinstance(count, int) else ""


def moment(seconds: Any) -> str:
    """A time since the epoch as date and time, UTC."""
    if not isinstance(seconds, int | float):
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
