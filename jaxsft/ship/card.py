"""MODEL_CARD.md: what a run knows of its model, in the form of Hugging Face's model cards, and nothing else.

YAML between two lines of `---`, which the hub and `huggingface_hub` read, then Markdown for people. Names of classes,
files and data are strangers' and change neither's structure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from ml_collections import ConfigDict

from jaxsft.cli import printable
from jaxsft.interpret.multilabel import METRICS
from jaxsft.interpret.report.reported import CALLED
from jaxsft.models.weights import ModelCard

FILE = "MODEL_CARD.md"
MOST_CLASSES = 50  # in an open table; more are folded
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
MARKS = re.compile(r"[\\`*_\[\]|#~$!]")
# Settings that hold paths of the machine, of which others need the last part only.
PATHS = ("data.data_dir", "model.weights", "train.teacher")
SOURCES = ("data.source", "data.unlabelled")  # KIND:PATH where the kind is one of files
OF_FILES = ("folder", "csv")


class Facts(NamedTuple):
    """All that a card is made of."""

    title: str  # what the run is called
    config: ConfigDict
    changed: Mapping[str, Any]  # its settings that are not the defaults, by their names
    card: ModelCard
    sha256: str  # of the model's weights, `facts.weights_sha256`
    step: int
    data: Mapping[str, Any]  # `fingerprint.fingerprint` of what it was trained and evaluated on; {}: not known
    records: Sequence[Mapping[str, Any]]  # the lines of its metrics.jsonl
    precision: str  # what it was computed in, as `models.precision.said` puts it; '': not known
    versions: Mapping[str, str]  # of what wrote its checkpoint
    parameters: int
    library: str = "jaxsft"  # whose model this is, on the hub
    usage: str = ""  # how the files beside the card are loaded, in Markdown


def model_card(facts: Facts) -> str:
    """The card as text."""
    card, config = facts.card, facts.config
    result = evaluation(facts)
    parts = [
        f"---\n{front_matter(facts, result)}---",
        f"# {plain(facts.title)}",
        f"{card.arch}, fine-tuned for {card.num_classes} classes"
        f"{', any number of them an image' * card.multi_label}, on {plain(source_of(config))}. "
        f"{headline(result, card)}",
        *([facts.usage] if facts.usage else []),
        "## Results",
        results(facts, result),
        "## Model",
        table(model_rows(facts)),
        "## Input and output",
        table(input_rows(card, result)),
        "## Training",
        table(training_rows(facts)),
        "Settings that differ from the defaults, as a config file. `python -m jaxsft.train --config FILE.py --workdir "
        "RUN` trains with them" + again(facts) + ":",
        config_file(facts),
        "## What is not known",
        unknown(facts, result),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts, result: Mapping[str, Any] | None) -> str:
    """What the hub reads, as YAML."""
    card, config = facts.card, facts.config
    kind, _, name = config.data.source.partition(":")
    found: dict[str, Any] = {
        "library_name": facts.library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "jax", "flax", "jaxsft", card.arch],
    }
    if kind == "hf":
        found["datasets"] = [printable(name.partition(":")[0])]
    found["metrics"] = ["accuracy", "f1"] if card.multi_label else ["accuracy"]
    if result:
        names = {"accuracy": "all labels right" if card.multi_label else "accuracy"}
        names |= {"f1_micro": "F1, micro", "map": "mean average precision"} if card.multi_label else {"top5": "top-5"}
        types = {"f1_micro": "f1", "map": "mAP", "top5": "top_5_accuracy"}
        metrics = [
            {"type": types.get(key, key), "value": round(float(result[key]), 6), "name": name}
            for key, name in names.items()
            if isinstance(result.get(key), int | float)
        ]
        source = printable(source_of(config))
        data = {"name": source, "type": source, "split": printable(config.data.eval_split or "eval")}
        task = {"type": "image-classification", "name": "Image classification"}
        entry = {"task": task, "dataset": data, "metrics": metrics}
        found["model-index"] = [{"name": printable(facts.title), "results": [entry]}]
    return yaml.safe_dump(found, sort_keys=False, width=1 << 20)


def evaluation(facts: Facts) -> Mapping[str, Any] | None:
    """The last line of the log that evaluates the card's step; None: it was not evaluated."""
    found = [r for r in facts.records if r.get("split") == "eval" and r.get("step") == facts.step]
    return found[-1] if found else None


def headline(result: Mapping[str, Any] | None, card: ModelCard) -> str:
    """What is most asked for, in a sentence."""
    if result is None:
        return "This step of the run was not evaluated."
    what = "All labels are right" if card.multi_label else "Right"
    return f"{what} on {counted(result)} images of its evaluation split."


def counted(result: Mapping[str, Any]) -> str:
    """'748 of 1000 (74.8 %)'."""
    accuracy, count = result.get("accuracy"), result.get("count")
    if not isinstance(accuracy, int | float) or not isinstance(count, int):
        return "an unknown number of"
    return f"{round(accuracy * count)} of {count} ({100 * accuracy:.1f} %)"


def results(facts: Facts, result: Mapping[str, Any] | None) -> str:
    """The evaluation of the card's step, and of each class where it is known."""
    if result is None:
        return f"Step {facts.step} was not evaluated."
    card, several = facts.card, facts.card.multi_label
    rows = [("all labels right" if several else "accuracy", counted(result))]
    for name in METRICS if several else ("top5",):
        if isinstance(result.get(name), int | float):
            rows.append(("top-5 accuracy" if name == "top5" else CALLED[name], f"{result[name]:.4f}"))
    rows.append(("loss", number(result.get("loss"))))
    parts = [f"At step {facts.step}, on the evaluation split{split_words(facts)}, each image once:", table(rows)]
    by_class = result.get("per_class")
    if isinstance(by_class, dict) and by_class:
        what = "average precision" if several else "accuracy"
        listed = table([(name, number(value)) for name, value in by_class.items()], ("class", what))
        if len(by_class) > MOST_CLASSES:
            listed = f"<details><summary>{what} of {len(by_class)} classes</summary>\n\n{listed}\n\n</details>"
        parts.append(listed)
    if card.temperature != 1:
        parts.append(
            f"Logits divided by {card.temperature:.4f} before they become probabilities: a fitted temperature."
        )
    return "\n\n".join(parts)


def split_words(facts: Facts) -> str:
    """Which split it was evaluated on, and how often."""
    split = facts.config.data.eval_split
    times = len({r.get("step") for r in facts.records if r.get("split") == "eval"})
    named = f" {plain(split)}" if split else ""
    metric = facts.config.checkpoint.best_metric
    chosen = f"; the best step by {metric} is chosen by the same numbers" if metric else ""
    return f"{named} ({times} evaluation{'s' * (times != 1)} in the run{chosen})"


def model_rows(facts: Facts) -> list[tuple[str, str]]:
    """What it is and what it was made of."""
    card = facts.card
    origin = f"{card.source} {card.weights_version}".strip()
    rows = [
        ("architecture", card.arch),
        ("parameters", f"{facts.parameters:,}"),
        ("training began with", origin or "random values"),
    ]
    if card.sha256:
        rows.append(("sha256 of that file", card.sha256))
    return [*rows, ("sha256 of the weights", facts.sha256)]


def input_rows(card: ModelCard, result: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the network takes and gives."""
    p, listed = card.preprocessing, ", ".join(card.names)
    if card.num_classes > MOST_CLASSES and result and result.get("per_class"):
        listed = f"the {card.num_classes} of the table above, in its order"
    how = "sigmoid of logits" if card.multi_label else "softmax of logits"
    return [
        ("resize", f"short side to {p.resize_size} px, {p.interpolation}, antialiased"),
        ("crop", f"the middle {p.crop_size} x {p.crop_size} px"),
        ("normalise", f"(RGB / 255 - {list(p.mean)}) / {list(p.std)}"),
        ("probabilities", how if card.temperature == 1 else f"{how} / {card.temperature}"),
        ("classes, in their order", listed),
    ]


def training_rows(facts: Facts) -> list[tuple[str, str]]:
    """What it was trained on, how long, and in which numbers."""
    config, rows = facts.config, [("data", source_of(facts.config))]
    for part, split in (("train", config.data.train_split), ("eval", config.data.eval_split), ("unlabelled", "")):
        if found := facts.data.get(part):
            named = f"{split}: " if split else ""
            rows.append((f"{part} split", f"{named}{found['images']} images, fingerprint {found['sha256']}"))
    last = max((r.get("step", 0) for r in facts.records), default=facts.step)
    epochs = next((r["epoch"] for r in reversed(facts.records) if r.get("step") == facts.step and "epoch" in r), None)
    in_epochs = f", {epochs:g} epochs" if isinstance(epochs, int | float) else ""
    rows.append(("steps", f"{facts.step}{f' of {last}' if last != facts.step else ''}{in_epochs}"))
    rows.append(("batch", f"{config.data.batch_size} images"))
    o = config.optim
    rows.append(("optimizer", f"{o.name}, lr {o.lr:g}, {o.schedule}, weight decay {o.weight_decay:g}"))
    rows.append(("augmentation", ", ".join(config.data.augment) or "none"))
    if config.train.ema or config.train.swa_epochs:
        rows.append(("these weights", "the average that the run keeps (train.ema, train.swa_epochs)"))
    if facts.precision:
        rows.append(("computed in", facts.precision))
    if facts.versions:
        rows.append(("written by", ", ".join(f"{name} {version}" for name, version in facts.versions.items())))
    return rows


def again(facts: Facts) -> str:
    """Where the config of the card is not the run's: its paths are cut."""
    return ", once its paths, of which the last part is left, are yours" if cut(facts) != dict(facts.changed) else ""


def cut(facts: Facts) -> dict[str, Any]:
    """The settings that differ from the defaults, without the folders of this machine."""
    found = dict(facts.changed)
    for name in PATHS:
        if isinstance(found.get(name), str):
            found[name] = PurePosixPath(found[name]).name
    for name in SOURCES:
        if isinstance(found.get(name), str):
            found[name] = without_folders(found[name])
    return found


def source_of(config: ConfigDict) -> str:
    """The data's name, without the folders of this machine."""
    return without_folders(config.data.source)


def without_folders(source: str) -> str:
    """'folder:/data/pets' as 'folder:pets'."""
    kind, colon, name = source.partition(":")
    return f"{kind}:{PurePosixPath(name).name}" if colon and kind in OF_FILES else source


def config_file(facts: Facts) -> str:
    """A config file of the settings, as a block of Python in Markdown."""
    lines = [f"    config.{name} = {as_python(value)}" for name, value in sorted(cut(facts).items())]
    head = ("from jaxsft import config as settings", "", "", "def get_config():", "    config = settings.default()")
    program = "\n".join([*head, *lines, "    return config"])
    longest = max((len(run) for run in re.findall("`+", program)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}python\n{program}\n{fence}"


def as_python(value: Any) -> str:
    """A setting as Python writes it, in ASCII: text of strangers stays in its line."""
    return ascii(value)


def unknown(facts: Facts, result: Mapping[str, Any] | None) -> str:
    """What nobody measured, and what the run does not know."""
    lines = [] if result else [f"The accuracy at step {facts.step}: it was not evaluated."]
    lines += [
        "What it makes of other images than those of the evaluation split.",
        "Whether the training and the evaluation images have anything in common, beyond what the data's splits say."
        if not facts.config.data.check_overlap
        else "How alike training and evaluation images are; identical files were looked for.",
        *(["Calibration: no temperature was fitted."] if facts.card.temperature == 1 else []),
        "The licences of the images and of the weights that training began with; this model has none stated.",
        "What the model is meant for.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def table(rows: Sequence[tuple[str, str]], columns: tuple[str, str] = ("", "")) -> str:
    """Two columns as a table of Markdown."""
    lines = [f"| {columns[0]} | {columns[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {plain(name)} | {plain(value)} |" for name, value in rows)])


def plain(text: str) -> str:
    """Text that Markdown and HTML take for nothing but text, in one line."""
    escaped = "".join(ENTITIES.get(c, c) for c in printable(text))
    return MARKS.sub(lambda mark: f"\\{mark[0]}", escaped)


def number(value: Any) -> str:
    """Four digits, or a word where there is no number."""
    return f"{value:.4f}" if isinstance(value, int | float) else "no examples" if value is None else json.dumps(value)
