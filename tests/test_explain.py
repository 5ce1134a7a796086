"""`jaxsft.explain`: files that can be looked at by everybody, from any picture; or one line that says what is wrong."""

from __future__ import annotations

import html.parser
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import jaxsft
from jaxsft import cli, storage
from jaxsft.explain import file_name
from jaxsft.interpret import explanations
from jaxsft.interpret.explanations import METHODS, Completeness, Explained, Explanation
from jaxsft.interpret.overlay import overlay, stretched
from jaxsft.run import explanation
from tests import small
from tests.commands import assert_refused, hear_command

ALL = " ".join(f"--method {name}" for name in METHODS)
HOSTILE = "<script>alert(1)<script> $x^2$ '\"& \u202e é"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "run"
    small.run_here(path, "--config.train.steps=3")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture in the folder of its class, one with a name that HTML, shells and TeX obey, one broken."""
    folder = tmp_path_factory.mktemp("images") / "ship"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", f"{HOSTILE.replace('/', '')}\udcff.png"):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / name)
    (folder / "broken.png").write_text("no picture")
    return folder


class Page(html.parser.HTMLParser):
    """What is in a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += [dict(attrs)] * (tag == "img")

    def handle_data(self, data: str) -> None:
        self.words += data


def test_every_method_leaves_pictures_a_sheet_and_numbers(workdir: Path, images: Path, tmp_path: Path) -> None:
    status, said, warned = hear_command(
        f"explain --workdir {workdir} {images} --out @/out --json @/out.json {ALL} --class true --class automobile"
        " --steps 3 --window 16",
        tmp_path,
    )
    assert status == 1, warned  # for one of them is broken
    assert f"left out {images}/broken.png" in warned
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["step"] == 3
    entries = found["explanations"]
    assert len(entries) == 2 * 2 * len(METHODS)
    assert [entry["method"] for entry in entries[:4]] == list(METHODS)
    assert [entry["class"] for entry in entries[:8:4]] == ["ship", "automobile"]
    assert {entry["layer"] for entry in entries} == {"layer1.0", None}
    for entry in entries:
        assert (entry["method"] == "integrated_gradients") == ("completeness" in entry)
        with PIL.Image.open(tmp_path / "out" / entry["picture"]) as picture:
            assert picture.size == (224, 224)
    complete = entries[2]["completeness"]
    assert complete["error"] == pytest.approx(complete["sum"] - complete["change"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {entry["picture"] for entry in entries} | {"index.html", "overview.png"}
    assert all(name.isascii() and set(name) <= set("+.-_") | set(filter(str.isalnum, name)) for name in names)
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "alert(1)" in page.words and "\u202e" not in page.words
    assert len(page.images) == 2 * (1 + 2 * len(METHODS))
    assert all(image["alt"] and str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert len(said.splitlines()) == len(entries) + 1


def test_the_predicted_class_is_predicts(workdir: Path, images: Path) -> None:
    run = jaxsft.load(workdir)
    (predicted,) = run.predict(images / "a.png", topk=1)
    (one,) = found = run.explain(images / "a.png", ["gradcam", "gradcam++"])
    assert [each.class_name for each in one.explanations] == [predicted["classes"][0]["class"]] * 2
    assert one.best[0][1] == pytest.approx(predicted["classes"][0]["probability"], abs=1e-6)
    assert one.explanations[0].values.shape == (32, 32)
    shown = Page(found._repr_html_())
    assert len(shown.images) == 3 and "script" not in shown.tags
    array = np.asarray(PIL.Image.open(images / "a.png").convert("RGB"))
    (again,) = run.explain(array)
    assert again.file == "image 0"
    np.testing.assert_array_equal(again.explanations[0].values, one.explanations[0].values)
    with pytest.raises(cli.UserError, match="an image in memory has no true class"):
        run.explain(array, classes="true")
    with pytest.raises(cli.UserError, match="no method or no class is named"):
        run.explain(array, methods=())


def test_pairs_are_explained_as_each_alone(workdir: Path) -> None:
    """More pairs than are explained at once, and not a multiple of them."""
    run = jaxsft.load(workdir)
    several = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    how = {"methods": "occlusion", "window": 32}  # all of it covered: one number an image, and little to compile
    found = run.explain(several, classes=["cat", "dog"], **how)
    assert [one.file for one in found] == [f"image {i}" for i in range(5)]
    for image, one in zip(several, found, strict=True):
        (alone,) = run.explain(image, classes="dog", **how)
        np.testing.assert_allclose(one.explanations[1].values, alone.explanations[0].values, atol=1e-4)
        assert one.explanations[1].logit == pytest.approx(alone.explanations[0].logit, rel=1e-4)


WRONG = (
    ("--method gradcam --method lime", "there is no method 'lime'; known: ..."),
    ("--class shop", "the model has no class 'shop'; did you mean 'ship'?"),
    ("--layer layer4", "one_block has no layer 'layer4'; did you mean 'layer1.0'?"),
    ("--layer fc", "layer fc of one_block gives no map of the image but [10]; name a layer that gives a map"),
    ("--method occlusion --stride 9 --window 8", "a window of 8 px moved by 9 px does not cover 32 px; ..."),
    ("--method occlusion --window 33", "a window of 33 px moved by 16 px does not cover 32 px; ..."),
    ("--method integrated_gradients --steps 0", "integrated gradients in 0 steps can't be; take 1 or more"),
    ("--baseline grey", "there is no baseline 'grey'; known: mean, black, white"),
    ("--checkpoint 2", "{workdir} has no intact checkpoint of step 2; name another --checkpoint"),
)


@pytest.mark.parametrize(("options", "expected"), WRONG)
def test_wrong_input_is_said_in_one_line(
    options: str, expected: str, workdir: Path, images: Path, tmp_path: Path
) -> None:
    command = f"explain --workdir {workdir} {images}/a.png --out @/out {options}"
    assert_refused(command, expected.format(workdir=workdir), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_and_nothing_is_half_written(workdir: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    begin = f"explain --workdir {workdir}"
    assert_refused(f"{begin} {images} --out @/out", "@/out exists; name another directory or remove it", tmp_path)
    status, said = hear_command(f"{begin} {images}/broken.png --out @/new", tmp_path)[::2]
    assert status == 2 and "error: none of 1 images can be read; name JPEG" in said
    (tmp_path / "strange").mkdir()
    shutil.copy(images / "a.png", tmp_path / "strange")
    refused = "@/strange/a.png lies in a folder 'strange', which is no class of the model; ..."
    assert_refused(f"{begin} @/strange --class true --out @/new", refused, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "strange"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def explained(name: str) -> Explained:
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    each = Explanation("integrated_gradients", name, 0.5, 1.0, values, completeness=Completeness(1.0, 0.9))
    return Explained(f"{name}.png", np.full((8, 8, 3), 128, np.uint8), ((name, 0.5),), (each,))


def section_of(name: str) -> str:
    one = explained(name)
    return explanations.section(one, explanations.encoded(one))


def test_names_of_classes_are_data(tmp_path: Path) -> None:
    """Of HTML, of TeX, no UTF-8, without an end."""
    for name in (HOSTILE, "\udcff$\\frac{", "x" * 5000, "</style></main>"):
        page = Page(explanations.head(name, [(name, name)]) + section_of(name) + explanations.FOOT)
        assert not {"script", "frac"} & set(page.tags)
        assert page.tags.count("main") == page.tags.count("section") == 1
        section_of(name).encode()
        assert explanations.overview([explained(name)]).startswith(b"\x89PNG")
    names: set[str] = set()
    made = [file_name(1, "a/ü.png", "occlusion", k, names) for k in ("é", "è", "../../etc", "")]
    assert len(set(made)) == 4 and not any("/" in name or ".." in name for name in made)


def test_probabilities_take_the_temperature(workdir: Path) -> None:
    run = jaxsft.load(workdir)
    logits = np.array([[1.0, 3.0, 1000.0]])
    cooler = type(run)(**{**vars(run), "card": run.card.__class__(**{**vars(run.card), "temperature": 2.0})})
    assert explanation.probabilities(cooler, logits[:, :2])[0, 1] == pytest.approx(1 / (1 + np.exp(-1)))
    several = type(run)(**{**vars(run), "card": run.card.__class__(**{**vars(run.card), "multi_label": True})})
    np.testing.assert_allclose(explanation.probabilities(several, logits)[0, :2], 1 / (1 + np.exp([-1, -3])))
    assert explanation.probabilities(run, logits)[0, 2] == explanation.probabilities(several, logits)[0, 2] == 1


def test_overlays() -> None:
    """The more, the lighter, so that it can be told in grey; orange speaks for, purple against, nothing shows grey."""
    image = np.full((1, 11, 3), 128, np.uint8)
    shares = overlay(image, np.linspace(0, 1, 11)[None])
    lightness = shares @ np.array([0.299, 0.587, 0.114])
    assert shares.dtype == np.uint8 and (np.diff(lightness) > 0).all()
    signed = overlay(image[:, :3], np.array([[-2.0, 0.0, 2.0]]), signed=True)
    assert signed.tolist() == [[[94, 60, 153], [192, 192, 192], [230, 97, 1]]]
    values = np.zeros((20, 20))
    assert not stretched(values).any()
    values[0, 0] = 1e-9
    assert stretched(values)[0, 0] == 1
    values = np.random.default_rng(0).standard_normal((50, 50))
    values[3, 3] = 1e6
    assert np.percentile(np.abs(stretched(values)), 90) > 0.3  # one pixel does not decide


@pytest.mark.full
def test_into_a_bucket(google, place, workdir: Path, images: Path, tmp_path: Path) -> None:
    assert hear_command(f"explain --workdir {workdir} {images}/a.png --out {place}/out", tmp_path)[0] == 0
    names = storage.location(f"{place}/out").walk()
    assert len(names) == 3 and "index.html" in names
    assert_refused(
        f"explain --workdir {workdir} {images}/a.png --out {place}/out",
        f"{place}/out exists; name another directory or remove it",
        tmp_path,
    )
