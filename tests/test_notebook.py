"""The notebook of the docs runs, and so does a run in a notebook that is stopped; in a kernel of Jupyter's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "finetune.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"
# The same cells on the one-block network, for two steps, and as where ipywidgets are not installed.
FEW = f"""
import sys
import convert.make_sample
from tests import small

RECIPE, EPOCHS = "{ROOT}/tests/small.py", 0.1
sys.modules["ipywidgets"] = None
whole = convert.make_sample.resnet10_w16
def resnet10_w16(num_classes):
    convert.make_sample.resnet10_w16 = whole  # of which the small one is made
    return small.in_torch(num_classes)
convert.make_sample.resnet10_w16 = resnet10_w16
"""


@pytest.fixture
def client(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """client(notebook): what executes it; the kernel starts in an empty folder, as a user's would."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = Config({"KernelManager": {"transport": "ipc"}})
    return lambda notebook: NotebookClient(notebook, timeout=600, config=options)


def read(first: str = "") -> Any:
    """The notebook; with `first` in the place of its cell of parameters."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = first or parameters.source
    return notebook


def printed(cell: Any) -> str:
    """All that a cell shows as text."""
    return "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs)


def check(notebook: Any) -> dict[str, Any]:
    """The cells by their names, once what they show has been looked at."""
    cells = {cell.id: cell for cell in notebook.cells}
    assert "finished" in printed(cells["finetune"])
    assert printed(cells["wrong"]) == "config.optim.lr is -1.0; it must be above 0\n"
    assert cells["mistakes"].outputs[-1].data["text/html"].count("<img ") == 12
    assert "image 4" in printed(cells["predict"])
    assert float(printed(cells["torch"]).split()[-4]) < 1e-5  # float32, as in parity
    assert printed(cells["load"]).endswith(" parameters\nShapeDtypeStruct(shape=(4, 10), dtype=float32)\n")
    warnings = [out.text for cell in notebook.cells for out in cell.get("outputs", ()) if out.get("name") == "stderr"]
    assert not warnings
    return cells


def test_its_outputs_are_stripped() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell["source"]


def test_it_runs_and_shows_bars_without_widgets(client) -> None:
    notebook = read(FEW)
    client(notebook).execute()
    shown = printed(check(notebook)["finetune"])
    assert "looking at pictures train: " in shown and "img/s" in shown


@pytest.mark.full
def test_it_tunes_in_two_minutes(client) -> None:
    """Counted in the time of processors, for the machine may have other things to do."""
    notebook = read()
    notebook.cells.append(nbformat.v4.new_code_cell("import os; print(sum(os.times()[:4]))", id="seconds"))
    client(notebook).execute()
    cells = check(notebook)
    assert float(printed(cells["seconds"])) < 120
    assert 0.66 < float(printed(cells["evaluate"]).rpartition("accuracy ")[2].split()[0]) < 0.77
    bars = [out for out in cells["finetune"].outputs if WIDGET in out.get("data", {})]
    assert len(bars) == 5  # of two splits that are indexed and decoded, and of training


SETUP = """
import jaxsft
config = jaxsft.recipe("cifar10:sample")
config.optim.warmup_epochs = 0.0
config.train.epochs = 1000.0
"""
AGAIN = """
config.train.epochs = 2.0
jaxsft.finetune(config, "other").finished, jaxsft.load("run").step == run.step
"""


@pytest.mark.full
def test_the_stop_button_saves_and_an_error_leaves_the_kernel_usable(client, tmp_path: Path) -> None:
    """Stopped while it trains, and while it compiles; then a wrong setting; then another run."""

    async def session() -> dict[str, Any]:
        sources = {
            "setup": SETUP,
            "stopped": 'run = jaxsft.finetune(config, "run"); run',
            "wrong": 'jaxsft.finetune(jaxsft.recipe("cifar10:smaple"), "wrong")',
            "early": 'jaxsft.finetune(config, "early")',
            "again": AGAIN,
        }
        cells = {name: nbformat.v4.new_code_cell(source) for name, source in sources.items()}
        notebook = nbformat.v4.new_notebook(cells=list(cells.values()))
        one = client(notebook)
        async with one.async_setup_kernel():
            for number, (name, cell) in enumerate(cells.items()):
                task = asyncio.create_task(one.async_execute_cell(cell, number))
                if name in ("stopped", "early"):
                    wanted = "compiled in" if name == "stopped" else "compiling"
                    while wanted not in printed(cell):
                        assert not task.done(), printed(cell)
                        await asyncio.sleep(0.1)
                    await asyncio.sleep(1 if name == "stopped" else 0)
                    await one.km.interrupt_kernel()
                if name in ("wrong", "early"):
                    with pytest.raises(CellExecutionError):
                        await task
                else:
                    await task
        return cells

    cells = asyncio.run(session())
    assert "not finished" in printed(cells["stopped"])
    assert "stopped: SIGINT at step " in printed(cells["stopped"])
    assert cells["wrong"].outputs[-1].traceback == [
        "error: configs/cifar10.py has no variant 'smaple'; did you mean 'sample'?"
    ]
    assert cells["early"].outputs[-1].ename == "KeyboardInterrupt"
    assert printed(cells["again"]).endswith("(True, True)")
