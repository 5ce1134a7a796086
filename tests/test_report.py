"""The report on runs: what it shows, that no name in it is obeyed, that it stays small and never costs a run."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict
from scipy.stats import binomtest

from jaxsft.interpret.metrics import Evaluation
from jaxsft.interpret.mistakes import Mistake
from jaxsft.interpret.multilabel import MultiLabelEvaluation
from jaxsft.interpret.report import comparison, lines, overview, page, single
from jaxsft.interpret.report.reported import Gallery, Reported
from jaxsft.models.weights import INTERPOLATIONS, ModelCard, Preprocessing
from tests import small

HOSTILE = (
    "</script><script>alert(1)</script>",
    "$\\frac{1}{0}$",
    "no \udcff\udcfe UTF-8",
    "<b onclick=x>&amp;%{x}\x1b[31m",
)
MOST_BYTES = 2_000_000


class Outline(HTMLParser):
    """What a browser would find: elements that are never closed or closed twice fail, text and JSON are gathered."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text, self.blocks = "", []  # type: ignore[var-annotated]
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"] and self.tags[-1][1].get("type"):
            self.blocks.append(json.loads(data))
        elif self.open[-1:] not in (["script"], ["style"]):
            self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(seed: int, side: int = 32) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def gallery(names: tuple[str, ...], count: int, side: int = 32) -> Gallery:
    return Gallery([
        Mistake(f"{names[k % len(names)]}/{k}.png", picture(k, side), names[k % len(names)], names[-1], 0.9)
        for k in range(count)
    ])  # fmt: skip


def answered(classes: int, count: int = 200, seed: int = 0) -> Evaluation:
    """An evaluation in which two answers of three are right."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count, dtype=np.int32)
    predicted = np.where(rng.random(count) < 0.67, label, rng.integers(0, classes, count, dtype=np.int32))
    answers = {
        "example": np.arange(count, dtype=np.int32),
        "label": label,
        "predicted": predicted.astype(np.int32),
        "rank": (label != predicted).astype(np.int32),
        "loss": rng.random(count),
        "probability": rng.uniform(0.2, 1, count),
    }
    return Evaluation(classes, answers)


def of_several(classes: int, count: int = 60) -> MultiLabelEvaluation:
    rng = np.random.default_rng(1)
    logits, label = rng.normal(0, 2, (count, classes)), (rng.random((count, classes)) < 0.4).astype(np.uint8)
    answers = {"example": np.arange(count), "label": label, "predicted": (logits > 0).astype(np.uint8),
               "logits": logits,
               "probabilities": 1 / (1 + np.exp(-logits)), "loss": rng.random(count),
               "probability": rng.random(count)}  # fmt: skip
    return MultiLabelEvaluation.of([{**answers, "mask": np.ones(count, bool)}], classes)


def log(steps: int = 40, every: int = 2, final: bool = True) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        base = {"step": step, "epoch": step / 10, "time": 1000.0 + step}
        lines.append({**base, "split": "train", "loss": 2 / step, "accuracy": 0.5, "lr": 0.1, "images_per_sec": 100.0})
        lines.append({**base, "split": "eval", "loss": 3 / step, "accuracy": 0.4, "top5": 0.9, "count": 200})
    if final:
        lines[-1]["final"] = True
    return lines


def told(names: tuple[str, ...] = ("ant", "bee", "cat"), result: Any = None, **more: Any) -> Reported:
    """A run, as it might be told."""
    config = ConfigDict({**small.config().to_dict(), **more.pop("settings", {})})
    result = answered(len(names)) if result is None else result
    several = isinstance(result, MultiLabelEvaluation)
    known: dict[str, Any] = {
        "name": "a", "place": "runs/a", "config": config, "changed": {"optim.lr": 0.1},
        "card": ModelCard("resnet18", len(names), names, multi_label=several), "precision": "float32",
        "records": log(), "result": result, "step": 40, "sizes": (10, 20),
        "parameters": [("parameter", "shape"), ("fc/kernel", "2x5")], "wrong": gallery(names, 24),
        "unsure": gallery(names, 24), "augmented": gallery(names, 32),
    }  # fmt: skip
    return Reported(**{**known, **more})


def outline(content: bytes) -> Outline:
    return Outline(content.decode())


def test_a_report_shows_all_that_it_should() -> None:
    start = {"step": 0, "time": 990.0, "devices": "2 x cpu core, pmap", "cpu": "Some CPU", "cores": 2,
             "versions": {"jax": "9.9"}}  # fmt: skip
    found = outline(single.report(told(starts=[start], left_out=3)))
    titles = [found.text.index(title) for title in (
        "Curves", "Confusions", "Worst mistakes", "Most uncertain", "Recall and precision of each class", "Reliability",
        "Augmented inputs", "About this run", "10 of 20 numbers train", "Settings that differ from their defaults",
        "9.9",
    )]  # fmt: skip
    assert len(titles) == 11
    for said in ("Some CPU, 2 cores", "2 x cpu core", "0:50 min", "finished after 4 epochs, 40 steps", "bad_files.txt"):
        assert said in found.text
    assert len(found.blocks) == 8 and all({"traces", "layout"} <= b.keys() or "entries" in b for b in found.blocks)
    (confusions,) = (block for block in found.blocks if "entries" in block)
    assert sum(confusions["entries"][2]) == 200


def test_a_report_can_be_read_by_who_sees_little() -> None:
    found = outline(single.report(told()))
    assert found.of("html")[0]["lang"] == "en"
    assert "width=device-width" in next(m["content"] for m in found.of("meta") if m.get("name") == "viewport")
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and set(levels[1:]) == {2}
    targets = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    assert {link["href"].lstrip("#") for link in found.of("a")} <= targets
    assert all(len(image["alt"]) > 5 for image in found.of("img")) and len(found.of("img")) == 80
    assert all("scope" in head for head in found.of("th"))
    assert len(found.of("caption")) == len(found.of("table"))
    assert all(a.get("data-said") for _, a in found.tags if a.get("class") == "plot")
    style = page.asset(page.STYLE)
    for rule in ("prefers-color-scheme: dark", ":focus-visible", "@media print", "forced-colors"):
        assert rule in style
    assert "transition" not in style and "animation" not in style


def test_names_are_shown_and_never_obeyed() -> None:
    run = told(HOSTILE, name=HOSTILE[0], place=HOSTILE[2], changed={HOSTILE[3]: HOSTILE[0]}, missing=HOSTILE[1])
    for content in (single.report(run), comparison.report([run, dataclasses.replace(run, name=HOSTILE[1])])):
        found = outline(content)
        scripts = [s for s in found.of("script") if s.get("type") != "application/json"]
        assert len(scripts) == 2 and all(not attributes for attributes in found.of("b"))
        assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
        shown = found.text + json.dumps(found.blocks, ensure_ascii=False)
        for name in ("</script><script>alert(1)</script>", "$\\frac{1}{0}$", "no \\udcff\\udcfe UTF-8", "\\x1b[31m"):
            assert name in shown or html.escape(name) in shown
        for block in found.blocks:  # Plotly takes a little HTML
            if "traces" in block:
                texts = json.dumps(block).replace("<br>", "").replace("<extra></extra>", "")
                assert "<" not in texts


def test_a_page_lets_nothing_run_but_its_two_scripts_and_loads_nothing() -> None:
    content = single.report(told()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', content)
    assert policy and "default-src 'none'" in policy[1]
    hashes = re.findall(r"'sha256-([^']+)'", policy[1])
    code = re.findall(r"<script>(.*?)</script>", content, re.S)
    assert hashes == [page.digest(one) for one in code] and len(code) == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', content.replace(code[0], ""))


def test_the_library_is_the_published_one() -> None:
    library = (page.FOLDER / page.LIBRARY).read_bytes()
    assert hashlib.sha256(library).hexdigest() == page.PLOTLY_SHA256
    assert f"plotly.js (basic - minified) v{page.PLOTLY_VERSION}".encode() in library[:100]
    assert b"Licensed under the MIT license" in library[:300]
    assert (page.FOLDER / "plotly-LICENSE.txt").read_text().startswith("MIT License")
    assert "</script" not in library.decode().lower() and "eval(" not in library.decode()


@pytest.mark.parametrize("classes", [pytest.param(100, marks=pytest.mark.full), 1000])
def test_a_report_stays_small(classes: int) -> None:
    names = tuple(f"class number {k} of many" for k in range(classes))
    run = told(names, answered(classes, 20_000), records=log(20_000), wrong=gallery(names, 24, 128),
               unsure=gallery(names, 24, 128), augmented=gallery(names, 32, 128))  # fmt: skip
    content = single.report(run)
    assert len(content) < MOST_BYTES  # with noise, the worst that a picture can be
    found = outline(content)
    assert any("entries" in block for block in found.blocks) == (classes <= 100)
    assert all(len(trace["y"]) <= lines.MOST_POINTS for b in found.blocks for trace in b.get("traces", []))


def test_several_labels_an_image() -> None:
    text = outline(single.report(told(result=of_several(3)))).text
    assert "Average precision and F1 of each class" in text and "images of 60" in text
    assert "Confusions" not in text and "share that is labelled so" not in text  # that is the legend's, in JSON
    assert "mAP" in text and "all labels right" in text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"records": []}, "begun, nothing logged yet"),
        ({"records": log(6, final=False)}, "not finished: at epoch 0.6 of 4"),
        ({"records": [{"step": 1, "split": "train", "epoch": 0.1, "loss": None}]}, "Nothing is logged yet"),
        ({"result": "none", "missing": "no images", "records": [{**log()[-1], "per_class": {"ant": 0.5, "bee": None}}]},
         "At the end of training"),
        ({"wrong": Gallery((), "24 of 24 images could not be read.")}, "24 of 24 images could not be read."),
        ({"parameters": (), "starts": (), "data": {}}, "They were not noted by this run."),
        ({"data": {"eval": {"images": 7, "sha256": "ab"}, "train": 3}}, "7, sha256 ab"),
    ],
)  # fmt: skip
def test_runs_that_have_less(more: dict[str, Any], said: str) -> None:
    run = told(**more)
    if more.get("result"):
        run = dataclasses.replace(run, result=None)
    assert said in outline(single.report(run)).text


def test_time_is_that_of_training_not_of_the_pause() -> None:
    lines = [{"step": 1, "time": 15.0}, {"step": 2, "time": 20.0}, {"step": 3, "time": 1003.0, "split": "train"}]
    assert told(records=lines, starts=[{"step": 0, "time": 10.0}, {"step": 2, "time": 1000.0}]).seconds() == 13
    assert told(records=lines).seconds() == 988
    assert told(records=[]).seconds() is None


def test_runs_side_by_side() -> None:
    one = told(settings={"seed": 1})
    lines = [{**line, "loss": line["loss"] * 2} for line in log()]
    other = dataclasses.replace(told(result=answered(3, seed=0)), name="b", records=lines)
    other.result.answers["rank"][:] = 1  # type: ignore[union-attr]
    content = comparison.report([one, other])
    found = outline(content)
    assert "a and b compared" in found.text and len(content) < MOST_BYTES
    settings = found.text.partition("Settings that differ\n")[2].partition("Curves")[0]
    assert "seed" in settings and "optim.lr" not in settings
    best = [a for _, a in found.tags if "best" in a.get("class", "").split()]
    assert len(best) >= 1  # accuracy; the losses of the evaluations are the same
    overlaid = next(b for b in found.blocks if "traces" in b)
    assert [trace["name"] for trace in overlaid["traces"]] == ["a", "b"]
    assert [trace["line"]["dash"] for trace in overlaid["traces"]] == ["solid", "dash"]
    assert "both right" in found.text


def test_runs_that_have_little_in_common() -> None:
    runs = [told(), told(("x", "y"), of_several(2), name="b", records=[]), told(("ant", "bee", "cat"), name="c")]
    runs[2] = dataclasses.replace(runs[2], result=None, missing="gone", records=[])
    text = outline(comparison.report(runs)).text
    assert "no class in common" in text and "c: gone" in text and "No two of the runs" in text
    same = [told(), told()]
    assert "runs/a (1)" in outline(comparison.report(same)).text
    assert "None: the configs are the same." in outline(comparison.report(same)).text


@pytest.mark.parametrize(("one", "other"), [(0, 0), (3, 9), (9, 3), (5, 5), (700, 900)])
def test_the_sign_test_is_scipys(one: int, other: int) -> None:
    expected = binomtest(one, one + other).pvalue if one + other else 1.0
    assert comparison.sign_test(one, other) == pytest.approx(expected, rel=1e-9)  # sums in another order


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_report_says_how_images_are_resized(interpolation: str) -> None:
    run = told()
    card = dataclasses.replace(run.card, preprocessing=Preprocessing(48, 40, interpolation=interpolation))
    facts = dict(overview.summary(dataclasses.replace(run, card=card)))
    assert facts["input"].startswith(f"short side 48 px ({interpolation}), middle 40 px, mean")


def test_a_report_names_the_loss_of_training() -> None:
    config = small.config("--config.train.loss=focal")
    config.unlock().train.label_smoothing = 0.0
    assert overview.training_loss(config) == "focal loss of gamma 2"
    config.train.update({"loss": "bce", "class_weights": ("balanced",)})
    assert overview.training_loss(config) == "binary cross-entropy, class weights"
    assert overview.training_loss(config, multi_label=True) == "class weights"
    config.train.update({"loss": "cross_entropy", "class_weights": ()})
    assert overview.training_loss(config) == ""


def test_a_training_loss_of_another_kind_says_so() -> None:
    run = told()
    run.config.train.mixup = 0.2
    (block, *_) = outline(single.report(run)).blocks
    assert [trace["name"] for trace in block["traces"]] == ["training, with mixup 0.2", "evaluation"]


def test_curves_leave_out_what_is_no_number_and_mark_a_single_point() -> None:
    log_lines = [
        {"split": "eval", "epoch": 1.0, "step": 5, "loss": 0.5},
        {"split": "eval", "epoch": 2.0, "step": 9, "loss": None},
    ]
    points = lines.points_of(log_lines, "eval", "loss")
    assert points == [(1.0, 5, 0.5)]
    chart = lines.curves("Loss", "loss", [lines.Points("a", points), lines.Points("none", [])])
    assert chart is not None
    (trace,) = chart.traces
    assert trace["mode"] == "lines+markers"
    assert lines.curves("Loss", "loss", [lines.Points("none", [])]) is None
    many = lines.thinned(list(range(5000)), 100)
    assert (len(many), many[0], many[-1]) == (100, 0, 4999)
