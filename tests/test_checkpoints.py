"""Files of weights: what is read, and every way in which one can be wrong."""

from __future__ import annotations

import functools
import hashlib
import http.server
import itertools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

import convert.__main__
from convert import checkpoints
from convert.__main__ import to_flax
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.data.augment import preprocess
from jaxsft.models import weights
from jaxsft.models.weights import Preprocessing
from jaxsft.run.prepare import prepare
from tests.files import write
from tests.oracle import tensors, torch_model

ARCH = "resnet18"


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    return torch_model(ARCH).state_dict()


def test_every_kind_of_file_gives_the_same_tensors(state_dict, tmp_path: Path) -> None:
    expected = {name: value.numpy() for name, value in state_dict.items()}
    data_parallel = {f"module.{name}": value for name, value in state_dict.items()}
    torch.save(state_dict, tmp_path / "plain.pth")
    torch.save(state_dict, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": state_dict, "epoch": 3}, tmp_path / "reference.pth")
    torch.save({"state_dict": data_parallel}, tmp_path / "parallel.pth")
    safetensors.torch.save_file(state_dict, tmp_path / "plain.safetensors")
    for path in sorted(tmp_path.iterdir()):
        found, card = checkpoints.read(str(path), ARCH)
        assert found.keys() == expected.keys(), path.name
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected), path.name
        assert card.num_classes == 10
        assert card.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(state_dict, tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()}
    path = tmp_path / f"half{suffix}"
    safetensors.torch.save_file(half, path) if suffix == ".safetensors" else torch.save(half, path)
    found, _ = checkpoints.read(str(path), ARCH)
    assert found["conv1.weight"].dtype == np.float32
    np.testing.assert_array_equal(found["conv1.weight"], half["conv1.weight"].float().numpy())


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def bad_files(folder: Path, state_dict) -> dict[str, tuple[str, str]]:
    """File name -> (arch, what the message must say)."""
    torch.save(state_dict, folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    safetensors.torch.save_file(state_dict, folder / "whole.safetensors")
    whole_safe = (folder / "whole.safetensors").read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "truncated.safetensors").write_bytes(whole_safe[: len(whole_safe) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.pth").write_text("not weights")
    (folder / "text.safetensors").write_text("not weights, and long enough to hold a header length")
    (folder / "header.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + whole_safe[8:])
    torch.save({"conv1.weight": Malicious(folder / "owned")}, folder / "malicious.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Malicious(folder / "owned")))
    torch.save(torch_model(ARCH), folder / "module.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"lr": 0.1}, folder / "numbers.pth")
    (folder / "weights.npz").write_bytes(b"")
    return {
        "truncated.pth": (ARCH, "not a whole PyTorch file"),
        "truncated.safetensors": (ARCH, "not a whole .safetensors file"),
        "empty.pth": (ARCH, "not a whole PyTorch file"),
        "empty.safetensors": (ARCH, "not a whole .safetensors file"),
        "text.pth": (ARCH, "refused"),
        "text.safetensors": (ARCH, "not a whole .safetensors file"),
        "header.safetensors": (ARCH, "not a whole .safetensors file"),
        "malicious.pth": (ARCH, "holds more than weights"),
        "pickle.pth": (ARCH, "holds more than weights"),
        "module.pth": (ARCH, "holds more than weights"),
        "list.pth": (ARCH, "not a state_dict"),
        "numbers.pth": (ARCH, "not a tensor"),
        "weights.npz": (ARCH, "no known kind of file"),
        "absent.pth": (ARCH, "no file"),
        "whole.pth": ("resnet81", "did you mean 'resnet18'?"),
    }


def test_bad_files_are_refused_in_one_line(state_dict, tmp_path: Path) -> None:
    for name, (arch, expected) in bad_files(tmp_path, state_dict).items():
        with pytest.raises(UserError) as error:
            checkpoints.read(str(tmp_path / name), arch)
        assert expected in str(error.value), name
        assert "\n" not in str(error.value), name
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def server(tmp_path: Path):
    """A web server on loopback: its folder and address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *arguments: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_download_checks_the_hash_in_the_name(server, tmp_path: Path, monkeypatch, state_dict) -> None:
    folder, address = server
    torch.save(state_dict, folder / "x.pth")
    content = (folder / "x.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    right, wrong = f"resnet18-{digest}.pth", "resnet18-00000000.pth"
    for name in (right, wrong):
        (folder / name).write_bytes(content)
    target = tmp_path / "hub"

    path = checkpoints.download(f"{address}/{right}", target)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="another sha256"):
        checkpoints.download(f"{address}/{wrong}", target)
    with pytest.raises(UserError, match="could not be fetched"):
        checkpoints.download(f"{address}/resnet18-11111111.pth", target)
    assert [p.name for p in target.iterdir()] == [right]

    path.write_bytes(content[:-1])  # damaged later: noticed, not used
    with pytest.raises(UserError, match="another sha256"):
        checkpoints.download(f"{address}/{right}", target)


def test_registry_weights_carry_their_preset(server, tmp_path: Path, monkeypatch) -> None:
    folder, address = server
    torch.save(torch_model("resnet50", num_classes=1000).state_dict(), folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"resnet50-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    real_download = checkpoints.download  # only the address changes: the rest is the real loading code
    monkeypatch.setattr(
        checkpoints, "download", lambda url, target: real_download(f"{address}/resnet50-{digest}.pth", target)
    )
    found, card = checkpoints.read("IMAGENET1K_V2", "resnet50")
    assert found.keys() == tensors(torch_model("resnet50", num_classes=1000)).keys()
    assert (card.weights_version, card.num_classes) == ("IMAGENET1K_V2", 1000)
    assert (card.preprocessing.resize_size, card.preprocessing.crop_size) == (232, 224)
    assert card.class_names is not None
    assert card.class_names[0] == "tench"


def preset(interpolation: InterpolationMode) -> Callable[[], torch.nn.Module]:
    """What torchvision's weights carry, for images of 40 px cut out of 48."""
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    return functools.partial(
        ImageClassification, crop_size=40, resize_size=48, mean=mean, std=std, interpolation=interpolation
    )


@pytest.fixture
def registered(server, tmp_path: Path, monkeypatch, state_dict):
    """Give torchvision's resnet18 one set of weights, of ten classes, with the preset that is asked for."""
    folder, address = server
    torch.save(state_dict, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"resnet18-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def register(transforms: Callable[[], torch.nn.Module]) -> None:
        entry = SimpleNamespace(
            url=f"{address}/resnet18-{digest}.pth",
            transforms=transforms,
            name="NEW",
            meta={"categories": [*"abcdefghij"]},
        )
        monkeypatch.setattr(checkpoints, "registry", lambda arch: {"NEW": entry})

    return register


@pytest.mark.parametrize("interpolation", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
def test_the_pictures_of_a_run_are_those_of_the_weights_preset(
    registered, tmp_path: Path, interpolation: InterpolationMode
) -> None:
    """From torchvision's registry by way of the card to the pixels that are evaluated and the crops of training."""
    transforms = preset(interpolation)
    registered(transforms)
    to_flax("NEW", ARCH, tmp_path / "ported")
    card = weights.ModelCard.load(tmp_path / "ported")
    assert card.preprocessing == Preprocessing(48, 40, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), interpolation.value)

    sizes = ((60, 80), (90, 50))  # two: a set of one size would go to the device as it is
    for split, label, (i, size) in itertools.product(("train", "val"), "ab", enumerate(sizes)):
        write(tmp_path / "data" / split / label / f"{i}.png", 2 * ord(label) + i, size)
    config = config_module.default()
    config.model.update({"weights": str(tmp_path / "ported")})
    config.data.update({"source": f"folder:{tmp_path / 'data'}", "preset": "weights", "image_size": 40, "workers": 0})
    config.data.update({"batch_size": 4, "augment": ("random_resized_crop",)})
    made, _ = prepare(config)
    assert made.card.preprocessing == card.preprocessing
    batch = made.eval_loader.batch(0)
    pixels, numbers = (np.asarray(batch[name]).reshape(4, *batch[name].shape[2:]) for name in ("image", "example"))
    found = np.asarray(preprocess(pixels, made.eval_loader.preprocessing))
    for number, image in zip(numbers, found, strict=True):
        path = sorted((tmp_path / "data" / "val").rglob("*.png"))[number]
        expected = transforms()(PIL.Image.open(path)).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(image, expected, rtol=0, atol=1e-6)  # float32, after the same levels
    assert made.train_loader.preprocessing == card.preprocessing  # the crop is resized on the device
    assert made.train_loader.reader.layout.interpolation == interpolation.value  # and the canvas before


def test_an_unknown_interpolation_is_refused_before_anything_is_fetched(registered, tmp_path: Path) -> None:
    registered(preset(InterpolationMode.LANCZOS))
    with pytest.raises(UserError, match="resnet18's NEW weights are .* by 'lanczos' interpolation; take weights for"):
        checkpoints.read("NEW", ARCH)
    assert not (tmp_path / "torch").exists()


def test_the_list_says_how_images_are_resized(monkeypatch, capsys) -> None:
    monkeypatch.setattr(convert.__main__, "ARCHITECTURES", dict.fromkeys(("resnet18", "efficientnet_b0")))
    convert.__main__.list_registry()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.endswith("  resize, crop, interpolation")
    found = {line.split()[0]: line.split("  ")[-1] for line in lines if " IMAGENET1K_V1 " in line}
    assert found == {"resnet18": "256, 224, bilinear", "efficientnet_b0": "256, 224, bicubic"}


def test_write_leaves_nothing_half_written(tmp_path: Path, state_dict) -> None:
    arrays = {name: value.numpy() for name, value in state_dict.items()}
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"out{suffix}"
        checkpoints.write(path, arrays)
        found, _ = checkpoints.read(str(path), ARCH)
        assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)
        with pytest.raises(UserError, match="exists"):
            checkpoints.write(path, arrays)
    with pytest.raises(UserError, match="neither"):
        checkpoints.write(tmp_path / "out.npz", arrays)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.pth", "out.safetensors"]
