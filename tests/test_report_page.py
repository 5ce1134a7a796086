"""The report in a browser: offline, wide and narrow, light and dark, by keyboard, with names that would rather be code.

Needs Chromium, as Debian packages it, and playwright.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxsft.interpret.report import comparison, single
from tests.test_report import HOSTILE, answered, told

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

SIZES = {"wide": (1280, 900), "narrow": (360, 740)}
# of an element's text on what is behind it, in WCAG 2's terms
CONTRAST = """
(cells) => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/\\d+/g).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return cells.filter((cell) => cell.textContent).map((cell) => {
    const style = getComputedStyle(cell);
    const [low, high] = [luminance(style.color), luminance(style.backgroundColor)].sort((a, b) => a - b);
    return [(high + 0.05) / (low + 0.05), cell.textContent, style.backgroundColor];
  });
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page that is open and drawn, and what the browser complained of."""

    def __init__(self, browser: Any, file: Path, size: str = "wide", scheme: str = "light"):
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        self.page.on(
            "request", lambda r: self.complaints.append(r.url) if not r.url.startswith(("file:", "data:")) else None
        )
        self.page.goto(file.as_uri())
        self.page.locator("html[data-drawn]").wait_for(state="attached", timeout=30_000)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.context.close()
        assert kind is not None or self.complaints == []


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "hostile.html"
    file.write_bytes(single.report(told(HOSTILE, name=HOSTILE[0])))
    return file


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    file = tmp_path_factory.mktemp("page") / "usual.html"
    file.write_bytes(single.report(told(names, answered(10, 1000))))
    return file


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "compared.html"
    runs = [told(), *(dataclasses.replace(told(), name=name) for name in HOSTILE)]
    file.write_bytes(comparison.report(runs))
    return file


def test_a_page_is_drawn_offline_and_names_are_text(browser: Any, hostile: Path) -> None:
    with Opened(browser, hostile) as opened:
        page = opened.page
        charts = page.locator("figure.chart")
        assert page.evaluate("document.documentElement.dataset.drawn") == str(charts.count()) == "7"
        assert page.locator(".plot svg.main-svg").count() >= charts.count()
        assert page.title() == page.locator("h1").inner_text() == HOSTILE[0]
        assert page.locator(".matrix tbody th").first.inner_text() == HOSTILE[0]
        ticks = page.locator("#classes .ytick text").all_text_contents()
        assert {tick.strip() for tick in ticks} >= {"</script><script>alert(…", "$\\frac{1}{0}$"}
        buttons = page.locator(".modebar-btn").evaluate_all("(all) => all.map((one) => one.dataset.title)")
        assert buttons and not [title for title in buttons if "hare" in title or "loud" in title]
        assert page.locator("b[onclick]").count() == 0 and page.locator("script").count() == 2 + charts.count() + 1


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["hostile", "usual", "compared"])
def test_a_page_fits(browser: Any, which: str, size: str, scheme: str, request: pytest.FixtureRequest) -> None:
    with Opened(browser, request.getfixturevalue(which), size, scheme) as opened:
        width, shown = opened.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= shown
        for plot in opened.page.locator(".plot").all():
            box = plot.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= shown
            assert plot.locator("svg.main-svg").first.bounding_box()["width"] <= box["width"] + 1


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Any, usual: Path, scheme: str) -> None:
    with Opened(browser, usual, scheme=scheme) as opened:
        cells = opened.page.locator(".matrix td").evaluate_all(CONTRAST)
        assert len(cells) > 50
        assert [cell for cell in cells if cell[0] < 4.5] == []  # WCAG's AA


@pytest.mark.full
def test_charts_follow_light_and_dark(browser: Any, usual: Path) -> None:
    with Opened(browser, usual) as opened:
        line = opened.page.locator("#curves .scatterlayer path.js-line").first

        def colour() -> str:
            return line.evaluate("(path) => getComputedStyle(path).stroke")

        assert colour() == "rgb(0, 114, 178)"
        opened.page.emulate_media(color_scheme="dark")
        until = time.monotonic() + 10
        while colour() == "rgb(0, 114, 178)" and time.monotonic() < until:
            opened.page.wait_for_timeout(50)
        assert colour() == "rgb(86, 180, 233)"


@pytest.mark.full
def test_the_keyboard_reaches_everything(browser: Any, usual: Path) -> None:
    with Opened(browser, usual) as opened:
        page, press = opened.page, opened.page.keyboard.press
        press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"

        button = page.locator("#curves .legend button").nth(1)
        button.focus()
        lines = page.locator("#curves figure.chart").first.locator("path.js-line")
        assert lines.count() == 2
        press("Space")
        assert button.get_attribute("aria-pressed") == "false" and lines.count() == 1
        press("Enter")
        assert button.get_attribute("aria-pressed") == "true" and lines.count() == 2

        page.locator("#curves .plot").first.focus()
        press("ArrowRight")
        press("ArrowRight")
        press("ArrowDown")
        readout = page.locator("#curves figure.chart .readout").first
        assert readout.text_content() == "epoch 0.4, evaluation 0.75"
        assert page.locator("#curves .plot").first.locator(".hoverlayer text").count() > 0
        press("Escape")
        assert readout.text_content() == ""

        page.locator(".matrix td[tabindex='0']").focus()
        press("ArrowRight")
        press("ArrowDown")
        press("ArrowDown")
        told_of = page.locator(".confusion .readout").inner_text()
        assert told_of.startswith("bird, taken for automobile: ") and " of " in told_of
        press("End")
        assert page.locator(".confusion .readout").inner_text().startswith("bird, taken for truck: ")

        summary = page.locator("#classes summary")
        summary.focus()
        press("Enter")
        head = page.locator("#classes th button").nth(4)
        head.focus()
        press("Enter")
        numbers = [int(text) for text in page.locator("#classes td:nth-child(5)").all_inner_texts()]
        assert numbers == sorted(numbers) and page.locator("#classes [aria-sort=ascending]").count() == 1
        press("Enter")
        numbers = [int(text) for text in page.locator("#classes td:nth-child(5)").all_inner_texts()]
        assert numbers == sorted(numbers, reverse=True)


@pytest.mark.full
def test_a_point_says_what_it_is(browser: Any, hostile: Path) -> None:
    with Opened(browser, hostile) as opened:
        plot = opened.page.locator("#classes .plot")
        plot.scroll_into_view_if_needed()
        bar = plot.locator(".barlayer path").first.bounding_box()
        opened.page.mouse.move(bar["x"] + bar["width"] / 3, bar["y"] + bar["height"] / 2)
        hover = plot.locator(".hoverlayer")
        hover.locator("text").first.wait_for()
        said = hover.text_content()
        assert "recall" in said and any(name.replace("\x1b", "\\x1b") in said or name[:8] in said for name in HOSTILE)


@pytest.mark.full
def test_it_prints_in_light_colours_within_the_page(browser: Any, usual: Path) -> None:
    with Opened(browser, usual, scheme="dark") as opened:
        content = opened.page.pdf(format="A4")
        assert content.startswith(b"%PDF") and 2 <= content.count(b"/Type /Page\n") <= 20
