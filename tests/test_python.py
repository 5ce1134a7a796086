"""`import jaxsft`: the runs that the commands make, in an interpreter that goes on whatever happens."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

import jaxsft
from jaxsft import cli
from jaxsft.data.base import Options
from jaxsft.data.embedded import open_sample
from jaxsft.interface import default_workdir
from jaxsft.interpret.mistakes import rank
from jaxsft.run import checkpoint
from jaxsft.run.events import NotHere
from jaxsft.run.log import records
from jaxsft.run.training import Trainer
from tests import small
from tests.commands import run_command
from tests.conftest import ROOT

SHORT = ("--config.train.epochs=1.5", "--config.eval.every_epochs=0.5")
STEPS = 6
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _signals_are_as_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def config(*overrides: str) -> ConfigDict:
    return small.config(*SHORT, *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> jaxsft.Run:
    return jaxsft.finetune(config(), tmp_path_factory.mktemp("python") / "run")


def at_step(monkeypatch: pytest.MonkeyPatch, wanted: int, what: Any) -> None:
    """Call `what` in the middle of a step, each time it comes."""
    update = Trainer.update

    def watched(self: Trainer, steps: range) -> None:
        if steps[0] == wanted:
            what()
        update(self, steps)

    monkeypatch.setattr(Trainer, "update", watched)


def test_importing_it_imports_nothing() -> None:
    program = "import sys, jaxsft; dir(jaxsft); jaxsft.UserError; print({'jax', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_no_module_takes_the_place_of_a_name() -> None:
    """Importing jaxsft.train makes `train` an attribute of the package, whatever stood there."""
    before = {name: getattr(jaxsft, name) for name in jaxsft.__all__}
    modules = [module.name for module in pkgutil.iter_modules(jaxsft.__path__) if module.name != "__main__"]
    for name in modules:
        importlib.import_module(f"jaxsft.{name}")
    assert {name: getattr(jaxsft, name) for name in jaxsft.__all__} == before
    assert not any(isinstance(value, types.ModuleType) for value in before.values())
    assert "train" in modules and not set(modules) & set(jaxsft.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        jaxsft.fit  # noqa: B018  (it is asked for)


def test_a_run_is_the_commands(run: jaxsft.Run, tmp_path: Path) -> None:
    arguments = " ".join((*small.ARGUMENTS, *SHORT))
    status, said = run_command(f"train {arguments} --workdir @/run", tmp_path)
    assert status == 0, said
    assert small.outcome(run.workdir) == small.outcome(tmp_path / "run")
    names = [{path.name.partition(".out.")[0] for path in place.iterdir()} for place in (run.workdir, tmp_path / "run")]
    assert names[0] == names[1]
    assert (run.step, run.finished) == (STEPS, True)


def test_a_finished_run_is_returned_as_it_is(run: jaxsft.Run, monkeypatch) -> None:
    at_step(monkeypatch, 1, lambda: pytest.fail("it is trained again"))
    assert jaxsft.finetune(FrozenConfigDict(config()), str(run.workdir)).step == STEPS  # type: ignore[arg-type]


# (step, signals that come in it, the step that is then saved or None where KeyboardInterrupt is raised); in turn
INTERRUPTIONS: tuple[tuple[int, tuple[int, ...], int | None], ...] = (
    (1, (signal.SIGINT,), None),
    (2, (signal.SIGINT,), 2),
    (4, (signal.SIGTERM,), 4),
    (6, (signal.SIGINT, signal.SIGINT), None),
)


def test_signals_end_the_run_and_never_the_interpreter(run: jaxsft.Run, tmp_path: Path, monkeypatch, capsys) -> None:
    heard: list[tuple[int, list[int]]] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append((number, checkpoint.steps(tmp_path))))
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        for step, numbers, saved in INTERRUPTIONS:
            with monkeypatch.context() as patch:
                at_step(patch, step, lambda numbers=numbers: [signal.raise_signal(number) for number in numbers])
                if saved is None:
                    with pytest.raises(KeyboardInterrupt):
                        jaxsft.finetune(config(), tmp_path)
                    continue
                capsys.readouterr()
                stopped = jaxsft.finetune(config(), tmp_path)
            assert (stopped.step, stopped.finished) == (saved, False)
            assert "not finished" in repr(stopped)
            name, where = signal.Signals(numbers[0]).name, tmp_path / "checkpoints" / str(saved)
            said = capsys.readouterr().err.splitlines()
            assert said[0].startswith(f"{name}: saving a checkpoint after this step")
            stopped_at = f"stopped: {name} at step {saved} of {STEPS}, saved in {where}, "
            assert re.fullmatch(rf"{re.escape(stopped_at)}\d+\.\d s after the notice; the same call resumes", said[1])
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ctrl_c)
    ((number, steps),) = heard  # the program's own, once all was saved
    assert number == signal.SIGTERM and steps[-1] == 4
    found: list[jaxsft.Run] = []
    thread = threading.Thread(target=lambda: found.append(jaxsft.finetune(config(), tmp_path)))
    thread.start()
    thread.join()
    assert found[0].finished
    assert small.outcome(tmp_path) == small.outcome(run.workdir)


def test_evaluation_and_mistakes_are_the_runs(run: jaxsft.Run) -> None:
    result, last = run.evaluate(), records(run.workdir)[-1]
    assert result.scalars() == {name: last[name] for name in result.scalars()}
    assert repr(result).startswith("<accuracy 0.")
    found = run.mistakes(1000)
    assert len(found) == result.count - round(result.accuracy * result.count)
    assert [entry.probability for entry in found] == sorted((entry.probability for entry in found), reverse=True)
    assert all(entry.label != entry.predicted for entry in found)
    source = open_sample("", "test[:40]", Options())
    for entry in found:
        number = int(entry.file.removeprefix("image "))
        assert source.class_names[source.labels[number]] == entry.label
        np.testing.assert_array_equal(np.asarray(entry.image), source.images[number])
    assert run.mistakes(3) == found[:3]
    assert found[:3] and run.mistakes(3)._repr_html_().count("<img ") == 3
    assert run.evaluate(split="test[:7]").count == 7


def test_mistakes_in_files_are_named(run: jaxsft.Run, tmp_path: Path) -> None:
    source = open_sample("", "test[:30]", Options())
    for number, label in enumerate(source.labels):
        path = tmp_path / source.class_names[label] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(source.images[number]).save(path)
    for entry in run.mistakes(30, f"folder:{tmp_path}"):
        assert Path(entry.file).parent.name == entry.label
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(entry.file)), np.asarray(entry.image))


def test_pictures_may_be_files_folders_and_in_memory(run: jaxsft.Run, tmp_path: Path) -> None:
    images = open_sample("", "test[:3]", Options()).images
    for number, image in enumerate(images):
        PIL.Image.fromarray(image).save(tmp_path / f"{number}.png")
    of_folder = run.predict(tmp_path)
    assert [entry["file"] for entry in of_folder] == [str(tmp_path / f"{n}.png") for n in range(3)]
    assert [len(entry["classes"]) for entry in run.predict(str(tmp_path / "0.png"), topk=2)] == [2]
    expected = [entry["classes"] for entry in of_folder]
    for given in (images, list(images), [PIL.Image.open(tmp_path / f"{n}.png") for n in range(3)]):
        assert [entry["classes"] for entry in run.predict(given)] == expected
    mixed = run.predict([images[0], tmp_path / "1.png", PIL.Image.fromarray(images[2])])
    assert [entry["file"] for entry in mixed] == ["image 0", str(tmp_path / "1.png"), "image 2"]
    assert [entry["classes"] for entry in mixed] == expected
    assert run.predict(images[0])[0]["classes"][0]["class"] == expected[0][0]["class"]  # in a batch of another size


def test_loaded_exported_ported_and_tuned_again(run: jaxsft.Run, tmp_path: Path, monkeypatch) -> None:
    loaded = jaxsft.load(run.workdir, 4)
    assert (loaded.step, jaxsft.load(str(run.workdir)).step) == (4, STEPS)
    logits = loaded.model.apply(loaded.variables, np.zeros((2, 32, 32, 3), np.float32), train=False)
    assert logits.shape == (2, 10)
    assert run.export(tmp_path / "tuned.safetensors") == tmp_path / "tuned.safetensors"
    ported = jaxsft.port(tmp_path / "tuned.safetensors", small.ARCH, tmp_path / "ported")
    onwards = config()
    onwards.model.weights = str(ported)
    monkeypatch.chdir(tmp_path)
    second = jaxsft.finetune(onwards)
    assert second.finished and second.workdir == default_workdir(onwards)
    onwards.checkpoint.keep = 7  # which changes nothing that is computed
    assert second.workdir == default_workdir(onwards)
    onwards.optim.lr = 0.5
    assert second.workdir != default_workdir(onwards)


# what -> (what is called with a run and a place, what is said)
WRONG = {
    "a recipe": (lambda run, place: jaxsft.recipe("cifar11"), "there is no config file cifar11; did you mean"),
    "a variant": (lambda run, place: jaxsft.recipe("cifar10:smaple"), "did you mean 'sample'"),
    "no config": (lambda run, place: jaxsft.finetune("cifar10:sample", place), "the config is a str; make one with"),
    "a value": (lambda run, place: jaxsft.finetune(changed("optim", "lr", -1.0), place), "it must be above 0"),
    "a key": (lambda run, place: jaxsft.finetune(changed("optim", "learning_rate", 0.1), place), "means nothing"),
    "another config": (lambda run, place: jaxsft.finetune(changed("optim", "lr", 9.0), run.workdir), "of another con"),
    "an address": (lambda run, place: jaxsft.load("what://bucket/run"), "what:// is not known"),
    "no run": (lambda run, place: jaxsft.load(place), "holds no run"),
    "no step": (lambda run, place: jaxsft.load(run.workdir, 5), "has no intact checkpoint of step 5"),
    "a picture": (lambda run, place: run.predict("nowhere.png"), "nowhere.png can't be read"),
    "no pictures": (lambda run, place: run.predict([]), "there is no image"),
    "floats": (lambda run, place: run.predict(np.zeros((8, 8, 3))), r"an array float64 \[8, 8, 3\] is no image"),
    "grey": (lambda run, place: run.predict([np.zeros((8, 8), np.uint8)]), r"an array uint8 \[8, 8\] is no image"),
    "a number": (lambda run, place: run.predict([3]), "a int is no image"),
    "no class": (lambda run, place: run.predict(np.zeros((8, 8, 3), np.uint8), 0), "topk is 0"),
    "a form": (lambda run, place: run.export(place / "x.tf"), "let it end in one of .pth, .safetensors, .stableh"),
    "weights": (lambda run, place: jaxsft.port(place / "x.pth", "resnet18", place / "out"), "x.pth"),
    "data": (lambda run, place: run.evaluate("floder:x"), "did you mean 'folder'"),
}


def changed(section: str, name: str, value: object) -> ConfigDict:
    made = config().unlock()
    made[section][name] = value
    return made


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_a_user_error_that_leaves_nothing(what: str, run: jaxsft.Run, tmp_path: Path) -> None:
    call, said = WRONG[what]
    with pytest.raises(jaxsft.UserError, match=said) as raised:
        call(run, tmp_path)
    assert not list(tmp_path.iterdir())
    assert raised.value._render_traceback_() == [f"error: {raised.value}"]


# A program that comes on stdin, as scripts do that have no file and no `if __name__ == "__main__"`.
ON_STDIN = """
import os, sys
import numpy as np, PIL.Image
import jaxsft
from jaxsft.data.base import Source
from tests import small

os.register_at_fork(before=lambda: print("forks", flush=True))
sys.argv = ["-", "--help"]
print("begins", flush=True)

class Mine(Source):
    class_names = ("dark", "light")

    def __init__(self, count):
        self.labels = np.arange(count, dtype=np.int32) % 2

    def __getitem__(self, index):
        return PIL.Image.fromarray(np.full((40 + index % 3, 50, 3), 50 + 100 * (index % 2), np.uint8))

    def select(self, indices):
        raise NotImplementedError

def open_mine(name, split, options):
    return Mine(16 if split == "train" else 5)

jaxsft.register_source("mine", open_mine)
config = small.config("--config.train.epochs=2", "--config.optim.warmup_epochs=0", "--config.data.workers=2")
config.data.update({"source": "mine", "train_split": "train", "eval_split": "", "augment": ()})
run = jaxsft.finetune(config, workdir=os.environ["PLACE"])
print(run.step, run.finished, sys.modules["__main__"].__file__)
"""


def test_a_program_on_stdin_with_a_source_of_its_own_and_workers(cache: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PLACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-"], input=ON_STDIN, check=False, cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("begins"), done.stdout.count("forks")) == (1, 0)
    assert done.stdout.splitlines()[-1] == "2 True <stdin>"
    assert "warning" not in done.stderr


def test_a_process_of_its_own_imports_what_this_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the folder holds that a notebook lies in."""
    for place, program in (("here", "open('ran', 'w')"), ("notebooks", "raise SystemExit(1)")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "of_ours.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "notebooks")
    cli.run_module("of_ours")
    assert (tmp_path / "notebooks" / "ran").exists()  # by the first of them, in this folder


def test_a_module_that_one_thread_does_without_is_there_for_others(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "costly.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [NotHere("costly"), *sys.meta_path])
    with pytest.raises(ImportError):
        importlib.import_module("costly")
    thread = threading.Thread(target=importlib.import_module, args=["costly"])
    thread.start()
    thread.join()
    assert "costly" in sys.modules


def test_the_surest_mistakes_come_first() -> None:
    answers = {
        "label": np.array([0, 1, 2, 1, 0, 2]),
        "predicted": np.array([1, 1, 0, 0, 2, 1]),
        "probability": np.array([0.5, 0.9, 0.7, np.nan, 0.7, 0.6]),
    }
    assert rank(answers, 3).tolist() == [2, 4, 5]
    assert rank(answers, 9).tolist() == [2, 4, 5, 0]
