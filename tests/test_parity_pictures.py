"""`jaxsft.parity --workdir`: one's own run and pictures against PIL, torchvision and its network; a fault is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jaxsft.data import decode
from jaxsft.models import weights
from jaxsft.parity import networks, pictures
from tests import small
from tests.commands import hear_command
from tests.files import picture, write

networks.NOT_IN_TORCHVISION[small.ARCH] = small.in_torch


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "run"
    small.run_here(path, "--config.train.steps=3")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger, smaller, turned, grey and transparent ones, and one that can't be read."""
    path = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(90, 60), (20, 30), (32, 32), (300, 30)]):
        write(path / f"a/{number}.png", number, size)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    write(path / "turned.jpg", 5, (40, 70), exif=exif)
    for mode in ("L", "RGBA", "P"):
        PIL.Image.fromarray(picture(50, 40)).convert(mode).save(path / f"{mode}.png")
    (path / "broken.png").write_bytes(b"no picture")
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_own_pictures_are_torchs(dtype: str, workdir: Path, folder: Path, tmp_path: Path) -> None:
    command = f"parity --workdir {workdir} {folder} --dtype {dtype} --json @/out.json"
    status, out, said = hear_command(command, tmp_path)
    assert status == 0, out
    assert said.startswith(f"warning: left out {folder}/broken.png: not an image")
    lines = out.splitlines()
    assert lines[0].startswith(f"{workdir} at step 3, {small.ARCH}, on 1 x cpu: {dtype}")
    assert lines[1].startswith("jaxsft ") and "torchvision" in lines[1]
    assert [line.split("  ")[0] for line in lines[3:7]] == [f"pictures/{name}" for name in pictures.QUANTITIES]
    assert all(line.endswith("  ok") for line in lines[3:7])
    assert lines[-1] == f"passed: {workdir}, {dtype}, 8 pictures"
    assert sum(line.startswith(f"  {folder}") for line in lines) == 5
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["passed"] and found["precision"].startswith(dtype) and len(found["rows"]) == 4 * 8
    rows = {row["name"]: row for row in found["rows"]}
    assert rows[f"pictures/decoded pixels/{folder}/turned.jpg"]["max_abs"] == 0
    assert all(set(row) == {"name", "max_abs", "relative", "tolerance", "passed"} for row in rows.values())
    logits = [row["relative"] for name, row in rows.items() if "/logits/" in name]
    assert max(logits) <= (1e-5 if dtype == "float32" else 1e-10)


def test_a_fault_is_named_with_its_picture(workdir: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A resize that is a level off in one picture, and a network that has other weights."""
    real = decode.middle

    def off(image: PIL.Image.Image, *rest: object) -> np.ndarray:
        found = real(image, *rest).copy()
        found[3, 3] ^= image.size == (30, 20)
        return found

    monkeypatch.setattr(decode, "middle", off)
    status, out, _ = hear_command(f"parity --workdir {workdir} {folder}/a", tmp_path)
    assert status == 1
    assert f"FAIL {folder}/a/1.png" in next(line for line in out.splitlines() if "model input" in line)
    assert out.splitlines()[-1].endswith(f"the first is pictures/model input/{folder}/a/1.png")
    assert out.partition("differ most")[2].splitlines()[1].startswith(f"  {folder}/a/1.png: decoded pixels 0.0e+00")
    monkeypatch.undo()
    monkeypatch.setattr(networks, "NOT_IN_TORCHVISION", {small.ARCH: other_weights})
    status, out, _ = hear_command(f"parity --workdir {workdir} {folder}/a", tmp_path)
    assert status == 1 and "the first is pictures/logits/" in out.splitlines()[-1]


def other_weights(classes: int):
    """A network that computes something else than what it is given."""
    model = small.in_torch(classes)
    model.bn1.eps = 1.0
    return model


def test_a_network_that_torchvision_lacks_is_one_line(workdir: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(networks, "NOT_IN_TORCHVISION", {})
    status, _, said = hear_command(f"parity --workdir {workdir} {folder}/a", tmp_path)
    assert (status, said) == (2, f"error: torchvision has no {small.ARCH}; name one of its own architectures\n")


@pytest.mark.full
def test_a_trained_resnet_on_photographs(cifar7: Path, tmp_path: Path) -> None:
    """torchvision's ResNet-18 with really trained weights, ported and exported again."""
    from convert.porting import to_flax
    from jaxsft import config as config_module
    from jaxsft.models.initial import make_model
    from jaxsft.run.saved import Run

    to_flax(str(cifar7), "resnet18", tmp_path / "ported")
    variables, card = weights.load(tmp_path / "ported")
    config = config_module.default()
    config.model.arch = "resnet18"
    run = Run(tmp_path, config, card, make_model(config, card.num_classes), variables, 0)
    paths = [str(write(tmp_path / f"{n}.jpg", n, (100 + 7 * n, 300 - 9 * n))) for n in range(20)]
    assert all(row.passed for row in pictures.compare(run, paths))
