"""Make the picture of a report that the README shows: its upper part, as Chromium draws it.

python3 docs/picture.py runs/sample/report.html docs/report.png
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import PIL.Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1280, 2010  # px


def picture(report: Path) -> PIL.Image.Image:
    """The page from its top, in the light theme."""
    with sync_playwright() as player:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(report.absolute().as_uri())
        page.locator("html[data-drawn]").wait_for(state="attached")
        content = page.screenshot()
        browser.close()
    return PIL.Image.open(io.BytesIO(content)).convert("RGB")


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    picture(source).quantize(256, dither=PIL.Image.Dither.NONE).save(target, optimize=True)
