"""The sheet of `jaxsft.explain` in a browser: it fits wide and narrow windows, and is dark where the system is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jaxsft.interpret import explanations
from tests.test_explain import HOSTILE, section_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")


@pytest.mark.full
def test_it_fits_and_runs_nothing(tmp_path: Path) -> None:
    named = (HOSTILE, "x" * 300, "a b " * 90)
    sections = "".join(map(section_of, named))
    page = explanations.head(HOSTILE, [("workdir", "y" * 300)]) + sections + explanations.FOOT
    (tmp_path / "index.html").write_text(page, encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        colours = {}
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 320)):
            tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            said: list[str] = []
            tab.on("dialog", lambda dialog, said=said: (said.append(dialog.message), dialog.dismiss()))
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.goto((tmp_path / "index.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate("[...document.images].every(image => image.naturalWidth >= 224)")
            assert not said
            colours[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colours["light"] != colours["dark"]
        browser.close()
