"""`python -m jaxsft.serve` as a process: under load, at its end, and with its page in a browser. Takes minutes."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import importlib.util
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from jaxsft import cli
from jaxsft.bench import serve as bench
from jaxsft.bench import serve_client
from jaxsft.ship.predictor import Predictor
from tests.serving import LIMITS, NAMES, PICTURES, on_socket, picture, predictor_of, untrained

pytestmark = pytest.mark.full
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    args = argparse.Namespace(arch="resnet10_w16", image_size=64)
    return bench.one_step(args, tmp_path_factory.mktemp("serve") / "run")


def answer_in_thread(address: tuple[str, int]) -> tuple[threading.Thread, list[serve_client.Outcome]]:
    """Ask for one picture, and do not wait for it."""
    heard: list[serve_client.Outcome] = []
    requests = serve_client.good([PICTURES["jpeg"]], True)
    thread = threading.Thread(target=lambda: heard.extend(asyncio.run(serve_client.load(*address, requests, 1))))
    thread.start()
    time.sleep(1)
    return thread, heard


def test_the_end_answers_what_is_in_flight(workdir: Path) -> None:
    options = ("--port=0", "--max-wait-ms=4000", "--max-batch=2")
    with bench.service("jaxsft.serve", f"--workdir={workdir}", *options) as (process, address):
        thread, heard = answer_in_thread(address)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        thread.join()
    assert [outcome.status for outcome in heard] == [200]


def test_a_second_signal_does_not_wait(workdir: Path, capfd) -> None:
    options = ("--port=0", "--max-wait-ms=50000", "--timeout-s=60", "--max-batch=2")
    with bench.service("jaxsft.serve", f"--workdir={workdir}", *options) as (process, address):
        thread, heard = answer_in_thread(address)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert process.wait(30) == cli.FAILED
        thread.join()
    said = capfd.readouterr().err
    assert "warning: 1 requests were left without their answer" in said and "Traceback" not in said
    assert [outcome.status for outcome in heard] in ([503], [0])


def test_the_load_test_passes(workdir: Path, tmp_path: Path, run) -> None:
    """200 requests of all kinds; torch and FastAPI find the same classes."""
    options = ("--requests", 200, "--timeout-s", 10, "--against", "torch", "--json", tmp_path / "out.json")
    done = run("-m", "jaxsft.bench", "serve", "--workdir", workdir, *options, optimised=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["passed"], record["exit_status"], record["mixed"]["wrong"]) == (True, 0, [])
    assert sum(sum(statuses.values()) for statuses in record["mixed"]["answers"].values()) == 200
    assert record["good"]["torch"]["failed"] == record["good"]["jaxsft"]["failed"] == 0
    assert record["good"]["same_class"] > 0.9  # of an untrained network, whose classes are near each other


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client", "python_multipart"])
def test_a_package_that_is_missing_is_named(package: str, workdir: Path, run) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from jaxsft import cli, serve; cli.run(serve.main)"
    done = run("-c", program, "--workdir", workdir, "--port", 0)
    assert (done.returncode, done.stderr) == (
        2, f"error: {package} is not installed; pip install 'jaxsft[serve]'\n")  # fmt: skip


@pytest.fixture(scope="module")
def predictor() -> Iterator[Predictor]:
    made = predictor_of(untrained())
    made.open()
    yield made
    made.close(30)


@contextlib.contextmanager
def browser(**options: Any) -> Iterator[Any]:
    """A page of Chromium's."""
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("no Chromium, or no playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium.new_page(**options)
        finally:
            chromium.close()


GIVE = """([kind, name, data]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], name));
  const options = {bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files};
  document.body.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options));
}"""


def give(page: Any, kind: str, name: str, content: bytes) -> str:
    """Drop or paste a file, and return what the page says in the end."""
    page.evaluate(GIVE, [kind, name, base64.b64encode(content).decode()])
    return settled(page)


def wait_for(page: Any, condition: str) -> None:
    """Wait until an expression of JavaScript is true; Playwright's own way needs a policy that lets pages eval."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


def settled(page: Any) -> str:
    """What the page says, once it is not looking any more."""
    wait_for(page, "!/Looking|^$/.test(document.getElementById('status').textContent)")
    return page.inner_text("#status")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [340, 1100])
def test_the_page_in_a_browser(width: int, scheme: str, predictor: Predictor) -> None:
    with (
        on_socket(predictor) as (address, _),
        browser(viewport={"width": width, "height": 800}, color_scheme=scheme) as page,
    ):
        asked, said = list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        home = f"http://{address[0]}:{address[1]}/"
        page.goto(home)
        wait_for(page, "document.getElementById('model').textContent.length > 1")
        assert page.inner_text("#model") == "one_block, 4 classes, step 7"
        hostile = "<img src=x onerror=document.title='hacked'>.jpg"
        assert "Answered in" in give(page, "drop", hostile, PICTURES["large"])
        assert hostile in page.inner_text("#name")
        rows = [entry.inner_text().split("\n") for entry in page.query_selector_all("#classes li")]
        shown = {"<b>bold</b>", "cat", "dog\ufffd[31m", "é\ufffd"}
        assert len(rows) == len(NAMES) and {name for name, _ in rows} == shown
        assert all(share.endswith(" %") for _, share in rows)
        widths = page.eval_on_selector_all(".fill", "all => all.map(one => one.getBoundingClientRect().width)")
        assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
        for image in ("#picture", "#overlay"):
            assert page.eval_on_selector(image, "i => i.complete && i.naturalWidth > 0 && i.offsetWidth > 100"), image
        assert page.get_attribute("#status", "aria-live") == "polite"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        assert "not an image" in give(page, "drop", "notes.txt", b"no picture")
        assert page.is_hidden("#result") and "wrong" in (page.get_attribute("#status", "class") or "")
        assert "Answered in" in give(page, "paste", "", PICTURES["jpeg"])
        assert "is over 1 MB" in give(page, "drop", "large.png", bytes(LIMITS.max_bytes + 1))
        assert "Answered in" in give(page, "drop", "a.tiff", PICTURES["cmyk"])
        wait_for(page, "document.getElementById('name').textContent.includes('can\\'t show it')")
        page.keyboard.press("Tab")  # the first stop is the file's
        assert page.evaluate("document.activeElement.id") == "file"
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files({"name": "chosen.jpg", "mimeType": "image/jpeg", "buffer": picture(80, 90)})
        wait_for(page, "document.getElementById('name').textContent.startsWith('chosen.jpg')")
        assert "Answered in" in settled(page)
        page.keyboard.press("Tab")
        page.keyboard.press("Space")  # no Grad-CAM
        wait_for(page, "document.getElementById('looked').hidden")
        assert "Answered in" in settled(page)
        assert page.title() == "What is on a picture"
        page.goto(home + "docs")
        assert "POST /predict" in page.inner_text("body")
        assert all(url.startswith((home, "blob:", "data:")) for url in asked), asked
        assert not [text for text in said if "400" not in text], said  # the browser notes that answer itself


def test_the_page_of_a_service_that_has_gone(predictor: Predictor) -> None:
    with browser() as page:
        with on_socket(predictor) as (address, _):
            page.goto(f"http://{address[0]}:{address[1]}/")
            wait_for(page, "document.getElementById('model').textContent.length > 1")
        assert "is the service still there?" in give(page, "drop", "a.jpg", PICTURES["jpeg"])
