"""The report on one run."""

from __future__ import annotations

from jaxsft.interpret.report import answers, overview, page
from jaxsft.interpret.report.reported import Reported


def report(run: Reported) -> bytes:
    """The page, as UTF-8."""
    sections = [
        overview.curves(run),
        *([] if run.card.multi_label else [answers.confusions(run)]),
        answers.worst(run),
        answers.unsure(run),
        answers.by_class(run),
        answers.calibration(run),
        answers.augmented(run),
        overview.about(run),
        overview.parameters(run),
        overview.settings(run),
        overview.machines(run),
    ]
    card = run.card
    said = f"{card.arch}, {card.num_classes} classes, {overview.state(run)}"
    header = page.joined([page.paragraph(said, "lead"), overview.tiles(run)])
    return page.document(run.name, header, sections)
