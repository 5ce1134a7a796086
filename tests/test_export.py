"""A fine-tuned run handed on: each form gives the model's logits, says what it is, and is not left where it differs."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision import transforms

import jaxsft
from convert import names
from jaxsft.data.augment import preprocess
from jaxsft.data.base import Options
from jaxsft.data.embedded import open_sample
from jaxsft.run import training
from jaxsft.run.saved import Run, load_run
from jaxsft.ship import check, onnx_file, stablehlo, state_dict
from jaxsft.ship.facts import as_text, facts, weights_sha256
from tests import small
from tests.commands import run_command
from tests.conftest import ROOT
from tests.programs import precisions

PHOTO = open_sample("", "test[:3]", Options()).images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module", autouse=True)
def _networks():
    """Let torch have the small run's network, as it has torchvision's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(state_dict.NOT_IN_TORCHVISION, small.ARCH, small.in_torch)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, its products in full on any machine; its pictures are resized to more than is cut out."""
    path = tmp_path_factory.mktemp("export") / "run"
    more = ("train.steps=3", "train.matmul_precision=highest", "data.resize_size=40", "data.mean=0.4,0.5,0.3")
    small.run_here(path, *(f"--config.{setting}" for setting in more))
    return path


@pytest.fixture(scope="module")
def run(workdir: Path) -> Run:
    return load_run(workdir)


@pytest.fixture(scope="module")
def exported(workdir: Path) -> Path:
    """A folder of the run in every form but ONNX, and a picture."""
    folder = workdir.parent / "exported"
    folder.mkdir()
    for form, name in (("torch", "tuned.pth"), ("safetensors", "tuned.safetensors"), ("stablehlo", "tuned.stablehlo")):
        export(workdir, form, folder / name)
    PIL.Image.fromarray(PHOTO[0]).resize((90, 64)).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def with_onnx(workdir: Path, exported: Path) -> Path:
    export(workdir, "onnx", exported / "tuned.onnx")
    return exported


def export(workdir: Path, form: str, out: Path, *options: str) -> None:
    status, said = run_command(
        f"export --workdir {workdir} --format {form} --out {out} {' '.join(options)}", out.parent
    )
    assert status == 0, said


def torchs(run: Run) -> torch.nn.Module:
    """torch's network of the run's values."""
    model = small.in_torch(num_classes=10)
    tensors = names.to_torch(run.variables, run.card.arch)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return model.eval()


def cropped(images: list[PIL.Image.Image]) -> np.ndarray:
    """What torchvision's evaluation cuts out of pictures, uint8 [N, 32, 32, 3]."""
    steps = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32)])
    return np.stack([np.asarray(steps(image)) for image in images])


def of_torch(run: Run, images: np.ndarray) -> np.ndarray:
    """What torch makes of such."""
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.4, 0.5, 0.3), STD)])
    with torch.no_grad():
        return torchs(run)(torch.stack([steps(image) for image in images])).numpy()


def assert_near(found: Any, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Of the largest logit; the order of sums, as in parity."""
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


def test_torchvision_takes_it_strictly_and_gives_the_same_logits(run: Run, exported: Path) -> None:
    images = np.random.default_rng(0).standard_normal((8, 32, 32, 3), np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(partial(run.model.apply, train=False))(run.variables, images))
    for read, name in ((torch.load, "tuned.pth"), (load_file, "tuned.safetensors")):
        model = small.in_torch(num_classes=10)
        model.load_state_dict(read(exported / name), strict=True)
        with torch.no_grad():
            assert_near(model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy(), ours)
        assert int(model.bn1.num_batches_tracked) == 3


def test_facts_travel_in_every_form(run: Run, with_onnx: Path) -> None:
    expected = as_text(facts(run.variables, run.card, run.step))
    assert json.loads(expected["classes"]) == list(run.card.names)
    assert json.loads(expected["preprocessing"])["resize_size"] == 40
    assert expected["sha256"] == weights_sha256({k: v.numpy() for k, v in torchs(run).state_dict().items()})
    assert torch.load(with_onnx / "tuned.pth", weights_only=True)._metadata["jaxsft"] == expected
    with safe_open(with_onnx / "tuned.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", **expected}
    of_onnx = {entry.key: entry.value for entry in onnx.load(with_onnx / "tuned.onnx").metadata_props}
    assert of_onnx.pop("images") == "float32 [n, 3, 32, 32], RGB, resized, cropped and normalised"
    assert of_onnx == expected
    with zipfile.ZipFile(with_onnx / "tuned.stablehlo") as archive:
        of_program = json.loads(archive.read("model.json"))
    assert of_program.pop("images") == "uint8 [n, 32, 32, 3], RGB, short side resized to 40 px, the middle cut out"
    assert of_program == state_dict.as_facts(expected)


def test_stablehlo_takes_pictures_as_evaluation_crops_them(run: Run, exported: Path) -> None:
    program = jax.export.deserialize(bytearray((exported / "tuned.stablehlo").read_bytes()))
    assert precisions(program.mlir_module()) == {"HIGHEST"}
    pictures = [PIL.Image.fromarray(image).resize((90, 64)) for image in PHOTO]
    for count in (1, 3):
        images = cropped(pictures[:count])
        assert_near(program.call(images), of_torch(run, images))


def test_stablehlo_of_raw_pictures_resizes_and_crops_them(run: Run) -> None:
    made = stablehlo.to_stablehlo(run.variables, run.card, image_size=(50, 70))
    images = np.stack([np.asarray(PIL.Image.fromarray(image).resize((70, 50))) for image in PHOTO])
    x = torch.from_numpy(np.asarray(preprocess(images, run.card.preprocessing)).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        assert_near(jax.export.deserialize(bytearray(made)).call(images), torchs(run)(x).numpy())


def test_onnx_takes_any_number_of_images(run: Run, with_onnx: Path) -> None:
    content = (with_onnx / "tuned.onnx").read_bytes()
    assert b"site-packages" not in content and str(ROOT).encode() not in content
    session = check.import_onnxruntime().InferenceSession(content)
    (takes,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (takes.name, takes.type, takes.shape) == ("images", "tensor(float)", ["n", 3, 32, 32])
    assert (gives.name, gives.type, gives.shape) == ("logits", "tensor(float)", ["n", 10])
    images = cropped([PIL.Image.fromarray(image) for image in PHOTO])
    x = ((images / np.float32(255) - np.float32((0.4, 0.5, 0.3))) / np.float32(STD)).transpose(0, 3, 1, 2)
    for count in (1, 3):
        (found,) = session.run(["logits"], {"images": x[:count]})
        assert_near(found, of_torch(run, images[:count]), 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("options", ["--preprocessing inside", "--image-size 50x70"])
def test_onnx_with_preprocessing_inside(options: str, workdir: Path, run: Run, tmp_path: Path) -> None:
    export(workdir, "onnx", tmp_path / "a.onnx", options)  # which compares it with ours
    session = check.import_onnxruntime().InferenceSession(tmp_path / "a.onnx")
    (takes,) = session.get_inputs()
    sides = [32, 32] if "inside" in options else [50, 70]
    assert (takes.name, takes.type, takes.shape) == ("images", "tensor(uint8)", ["n", *sides, 3])


def test_the_hub_reads_the_folder(workdir: Path, run: Run, tmp_path: Path) -> None:
    export(workdir, "hf", tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "folder").iterdir())
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["label_names"] == list(run.card.names)
    assert config["jaxsft"] == state_dict.as_facts(as_text(facts(run.variables, run.card, run.step)))
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    card = huggingface_hub.ModelCard.load(tmp_path / "folder" / "README.md")
    assert card.data.library_name == "torchvision"
    assert card.data.eval_results[0].metric_value == run_accuracy(workdir)
    model = small.in_torch(num_classes=10)
    model.load_state_dict(load_file(tmp_path / "folder" / "model.safetensors"), strict=True)


def run_accuracy(workdir: Path) -> float:
    return round(json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["accuracy"], 6)


def test_a_run_leaves_its_card_and_export_makes_it_again(workdir: Path, tmp_path: Path) -> None:
    export(workdir, "card", tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text() == (workdir / "MODEL_CARD.md").read_text()
    card = huggingface_hub.ModelCard.load(tmp_path / "card.md")
    assert (card.data.pipeline_tag, card.data.model_name) == ("image-classification", workdir.name)
    correct = round(40 * run_accuracy(workdir))
    assert f"{correct} of 40 (" in card.text and "computed in | float32" in card.text


def test_a_card_that_fails_costs_no_run(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("no words")

    monkeypatch.setattr("jaxsft.run.model_card.model_card", fail)
    state = SimpleNamespace(evaluated=lambda: run.variables)
    job = SimpleNamespace(config=run.config, card=run.card, state=state, total_steps=3, data={}, precision="")
    training.write_card(job, SimpleNamespace(path=tmp_path, place=tmp_path))
    assert capsys.readouterr().err == "warning: no MODEL_CARD.md could be made: RuntimeError: no words\n"
    assert not list(tmp_path.iterdir())


def snippets() -> list[str]:
    """The programs of docs/export.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(snippets())))
def test_the_programs_of_the_docs_run(number: int, workdir: Path, with_onnx: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(with_onnx)
    program = snippets()[number].replace("torchvision.models.resnet18", "small.in_torch")
    exec(program, {"small": small})
    (expected,) = jaxsft.load(workdir).predict("picture.png", 1)
    if "print" in program:
        assert capsys.readouterr().out.strip() == expected["classes"][0]["class"]


# form -> (file, what is broken on the way, a part of what is said)
BROKEN = {
    "torch": ("a.pth", "jaxsft.ship.state_dict.names.to_torch", "does not agree with the model: logits within"),
    "safetensors": ("a.safetensors", "jaxsft.ship.state_dict.names.to_torch", "does not agree with the model"),
    "hf": ("a", "jaxsft.ship.state_dict.names.to_torch", "does not agree with the model"),
    "stablehlo": ("a.stablehlo", "jaxsft.ship.stablehlo.normalise", "does not agree with the model"),
}


@pytest.mark.parametrize("form", BROKEN)
def test_what_differs_is_not_left(form: str, workdir: Path, tmp_path: Path, monkeypatch) -> None:
    name, place, expected = BROKEN[form]
    if form == "stablehlo":
        own = stablehlo.normalise
        monkeypatch.setattr(place, lambda images, to: own(images, to) * 1.001)
    else:
        break_tensors(monkeypatch, "fc.bias")
    status, said = run_command(f"export --workdir {workdir} --format {form} --out @/{name}", tmp_path)
    assert (status, said.count("\n")) == (1, 1), said
    assert expected in said and said.endswith("; nothing was written\n")
    assert not list(tmp_path.iterdir())


def break_tensors(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    """Let one tensor of what is written be another, by more than rounding, and its facts be right."""
    own = names.to_torch

    def to_torch(variables: Any, arch: str) -> dict[str, np.ndarray]:
        tensors = own(variables, arch)
        return {**tensors, changed: tensors[changed] + np.float32(1e-3)}

    monkeypatch.setattr(state_dict, "names", type("names", (), {"to_torch": staticmethod(to_torch)}))


def test_a_network_that_torch_lacks_is_compared_tensor_by_tensor(run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delitem(state_dict.NOT_IN_TORCHVISION, small.ARCH)
    model, pictures = check.Model(run.variables, run.card, run.step), check.Pictures(PHOTO, True)
    state_dict.write(tmp_path / "a.safetensors", *model)
    said = check.check_state_dict(tmp_path / "a.safetensors", model, pictures)
    assert said.startswith("its ") and said.endswith("torchvision has no one_block: no network of its own was run")
    break_tensors(monkeypatch, "fc.weight")
    state_dict.write(tmp_path / "b.safetensors", *model)
    with pytest.raises(jaxsft.Stop, match="other numbers than the model's"):
        check.check_state_dict(tmp_path / "b.safetensors", model, pictures)


def test_facts_that_differ_are_noticed(run: Run, tmp_path: Path, monkeypatch) -> None:
    model, pictures = check.Model(run.variables, run.card, run.step), check.Pictures(PHOTO, True)
    state_dict.write(tmp_path / "a.pth", run.variables, run.card, 4)
    with pytest.raises(jaxsft.Stop, match="does not tell its step"):
        check.check_state_dict(tmp_path / "a.pth", model, pictures)
    monkeypatch.setattr(stablehlo, "facts", lambda *args: {**facts(*args), "classes": []})
    (tmp_path / "a.stablehlo").write_bytes(stablehlo.to_stablehlo(run.variables, run.card, step=run.step))
    with pytest.raises(jaxsft.Stop, match="does not tell its classes"):
        check.check_stablehlo(tmp_path / "a.stablehlo", model, pictures)


def test_an_onnx_file_that_differs_is_noticed(run: Run, with_onnx: Path) -> None:
    model, pictures = check.Model(run.variables, run.card, run.step), check.Pictures(PHOTO, True)
    altered = jax.tree.map(lambda x: x, run.variables)
    altered["params"]["fc"]["bias"] = altered["params"]["fc"]["bias"] + 1e-2
    with pytest.raises(jaxsft.Stop, match="does not tell its sha256"):
        check.check_onnx(with_onnx / "tuned.onnx", check.Model(altered, *model[1:]), pictures, inside=False)
    file = onnx.load(with_onnx / "tuned.onnx")
    (bias,) = [tensor for tensor in file.graph.initializer if tensor.name == "fc.bias"]
    bias.raw_data = (onnx.numpy_helper.to_array(bias) + np.float32(1e-2)).tobytes()
    with pytest.raises(jaxsft.Stop, match="does not agree with the model: logits within"):
        check_bytes(file.SerializeToString(), with_onnx.parent / "b.onnx", model, pictures)


def check_bytes(content: bytes, path: Path, model: check.Model, pictures: check.Pictures) -> str:
    path.write_bytes(content)
    return check.check_onnx(path, model, pictures, inside=False)


def test_data_that_are_gone_are_replaced_by_named_images(workdir: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"] |= {"source": f"folder:{tmp_path}/gone"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    command = "export --workdir @/run --format safetensors --out @/a.safetensors"
    status, said = run_command(command, tmp_path)
    assert status == 2 and said.endswith(", or name images to compare on with --images\n"), said
    assert not (tmp_path / "a.safetensors").exists()
    status, said = run_command(f"{command} --images {exported}/picture.png", tmp_path)
    assert status == 0, said
    (tmp_path / "text.png").write_text("no picture")
    status, said = run_command(command.replace("a.s", "b.s") + " --images @/text.png", tmp_path)
    assert status == 2 and "none of the images to compare on can be read" in said
    assert not (tmp_path / "b.safetensors").exists()


WRONG = (
    ("tf", "x.tf", "known: torch, safetensors, stablehlo, onnx, int8, hf, card"),
    ("torch", "x.safetensors", "let it end in .pth"),
    ("safetensors", "there.safetensors", "exists"),
    ("hf", "full", "exists"),
    ("card", "x.txt", "let it end in .md"),
    ("torch", "x.pth --image-size 3x4", "--format torch has no --image-size; leave it out; it is for stablehlo, onnx"),
    ("stablehlo", "x.stablehlo --preprocessing outside", "has no --preprocessing"),
    ("onnx", "x.onnx --preprocessing in", "it must be inside or outside"),
    ("onnx", "x.onnx --preprocessing outside --image-size 3x4", "leave out one of them"),
    ("onnx", "x.onnx --image-size 3", "3 is no HEIGHTxWIDTH"),
    ("onnx", "x.onnx --image-size 0x5", "0x5 is no HEIGHTxWIDTH"),
    ("torch", "x.pth --images @/nowhere.png", "nowhere.png can't be read"),
)


def test_wrong_input_is_said_in_one_line(workdir: Path, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for form, name, expected in WRONG:
        status, said = run_command(f"export --workdir {workdir} --format {form} --out @/{name}", tmp_path)
        assert status == 2, name
        assert said.startswith("error: "), said
        assert expected in said
        assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "there.safetensors"]


def test_a_missing_package_is_named(workdir: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("onnxruntime", "onnx"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, name, None)
            status, said = run_command(f"export --workdir {workdir} --format onnx --out @/a.onnx", tmp_path)
            assert (status, said) == (2, f"error: {name} is not installed; pip install 'jaxsft[onnx]'\n")
    assert not list(tmp_path.iterdir())


def test_what_is_too_large_for_onnx_is_refused(run: Run, monkeypatch) -> None:
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 1000)
    with pytest.raises(jaxsft.UserError, match="one_block takes .* GiB, and an ONNX file at most 2"):
        onnx_file.to_onnx(run.variables, run.card, inside=False)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(run: Run, ending: str, tmp_path: Path, monkeypatch) -> None:
    def full(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(jaxsft.UserError, match="can't be written: No space left on device; name another"):
        jaxsft.load(run.workdir).export(tmp_path / f"tuned{ending}")
    assert list(tmp_path.iterdir()) == []
