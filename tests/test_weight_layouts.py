"""Files of weights as training scripts leave them: whatever they are called, whatever lies around the tensors."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from convert import checkpoints
from convert.__main__ import main, to_flax, to_torch, verify
from jaxsft.cli import UserError
from jaxsft.data.embedded import WEIGHTS as SAMPLE
from jaxsft.models import weights
from jaxsft.parity import __main__ as parity

ARCH = "resnet10_w16"
REAL = safetensors.torch.load_file(SAMPLE)
BODY = {name: value for name, value in REAL.items() if not name.startswith("fc.")}
OTHER = {name: torch.zeros_like(value) for name, value in REAL.items()}  # never to be taken
LATER = datetime.datetime(2024, 1, 1)


def behind(prefix: str, tensors: dict[str, torch.Tensor] = REAL) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


# What scripts save; each holds REAL, or BODY where its name says "no head".
LAYOUTS = {
    "plain": REAL,
    "parameters": {name: torch.nn.Parameter(v) if v.is_floating_point() else v for name, v in REAL.items()},
    "torchvision's reference script": {
        "model": REAL,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, output_dir=pathlib.Path("out"), nested=argparse.Namespace(a=[1])),
        "scaler": None,
    },
    "its average beside": {"model_ema": behind("module.", OTHER), "model": REAL},
    "its average alone": {"model_ema": {"n_averaged": torch.tensor(9), **behind("module.")}, "epoch": 1},
    "AveragedModel": {"n_averaged": torch.tensor(9), **behind("module.")},
    "torch.compile": behind("_orig_mod."),
    "torch.compile in DataParallel": behind("module._orig_mod."),
    "DataParallel in torch.compile": {"state_dict": behind("_orig_mod.module.")},
    "a stage compiled": {name.replace("layer1.", "layer1._orig_mod."): value for name, value in REAL.items()},
    "numpy scalars beside": {
        "state_dict": REAL,
        "best": np.float64(0.9),
        "step": np.int64(7),
        "rates": np.linspace(0, 1, 5),
        "kind": np.dtype("float32"),
        "when": LATER,
    },
    "model_state_dict": {"model_state_dict": REAL, "loss": 0.1},
    "net": {"net": behind("module."), "acc": 93.1},
    "a holder in a holder": {"state_dict": {"model": REAL}},
    "model.": {"state_dict": behind("model."), "hyper_parameters": {"lr": 0.1}},
    "backbone.": behind("backbone."),
    "encoder., no head": behind("encoder.", BODY),
    "two prefixes": behind("module.model.backbone."),
    "no head": BODY,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path: Path, layout: str) -> None:
    torch.save(LAYOUTS[layout], tmp_path / "x.pth")
    expected = BODY if "no head" in layout else REAL
    found, card = checkpoints.read(str(tmp_path / "x.pth"), ARCH)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].numpy().tobytes() for name in expected)
    assert card.num_classes == (0 if expected is BODY else 7)


def test_files_are_known_by_their_content(tmp_path: Path, monkeypatch) -> None:
    torch.save(REAL, tmp_path / "zip")
    torch.save(REAL, tmp_path / "pickle", _use_new_zipfile_serialization=False)
    # A header of 0x..80 bytes: the first byte is a pickle's.
    name = next(n for n in range(200) if (safetensors_of("x" * n)[0]) == 0x80)
    (tmp_path / "safetensors").write_bytes(safetensors_of("x" * name))
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in ("zip", "pickle", "safetensors"):
        content = (tmp_path / kind).read_bytes()
        for ending in ("", ".pth", ".pt", ".pth.tar", ".ckpt", ".bin", ".PTH", ".safetensors", ".model"):
            (tmp_path / f"renamed{ending}").write_bytes(content)
            found, _ = checkpoints.read(f"~/renamed{ending}", ARCH)
            assert found["fc.bias"].tobytes() == REAL["fc.bias"].numpy().tobytes(), (kind, ending)


def safetensors_of(text: str) -> bytes:
    return safetensors.torch.save(REAL, {"text": text})


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("text")
    (tmp_path / "b").write_bytes(b"")
    np.savez(tmp_path / "c.npz", x=np.zeros(3))
    for name, said in (("a.ckpt", "no known kind"), ("b", "no known kind"), ("c.npz", "not a whole PyTorch file")):
        with pytest.raises(UserError, match=said):
            checkpoints.read(str(tmp_path / name), ARCH)
    for name, said in (("x" * 300, "has no weights"), ("a\0b.pth", "no file"), (str(tmp_path), "no file")):
        with pytest.raises(UserError, match=said):
            checkpoints.read(name, "resnet18")
    with pytest.raises(UserError, match="ftp:// is not known"):
        checkpoints.read("ftp://bucket/x.pth", ARCH)


class Wants:
    """Pickled, it asks for a function; loaded, it would be called."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def test_code_is_refused_by_its_name_and_without_advice_how_to_run_it(tmp_path: Path) -> None:
    bad = {
        "global.pth": ({"model": REAL, "x": Wants(os.path.join, "a")}, "it asks for posixpath.join"),
        "blocked.pth": ({"model": REAL, "x": Wants(os.system, f"touch {tmp_path}/owned")}, "it asks for posix.system"),
        "function.pth": ({"x": Wants(getattr, "a", "real")}, "it asks for getattr"),
        "module.pth": (torch.nn.Linear(1, 1), "it asks for torch.nn.modules.linear.Linear"),
        "called.pth": ({"x": Wants(argparse.Namespace)}, "twice|not a tensor"),
    }
    for name, (value, said) in bad.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(UserError, match=said) as error:
            checkpoints.read(str(tmp_path / name), ARCH)
        assert_no_advice(str(error.value))
    (tmp_path / "protocol4.pth").write_bytes(pickle.dumps({"a": [1, {2}]}, 4))
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
    for name, said in (("protocol4.pth", "refused"), ("script.pt", "it is a TorchScript archive")):
        with pytest.raises(UserError, match=said) as error:
            checkpoints.read(str(tmp_path / name), ARCH)
        assert_no_advice(str(error.value))
    assert not (tmp_path / "owned").exists()


def assert_no_advice(message: str) -> None:
    assert not any(word in message for word in ("weights_only", "safe_globals", "trust", "\n"))
    assert "save" in message
    assert len(message) < 500


def test_a_zip_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(UserError, match="its records would unpack to 4,000"):
        checkpoints.read(str(tmp_path / "bomb.pth"), ARCH)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    torch.save({**REAL, "module.fc.bias": REAL["fc.bias"] + 1}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"'fc.bias' twice: as 'fc.bias' and 'module.fc.bias'"):
        checkpoints.read(str(tmp_path / "x.pth"), ARCH)


def test_weights_without_a_head_are_ported_and_say_so(tmp_path: Path, capsys) -> None:
    torch.save(BODY, tmp_path / "body.pth")
    to_flax(str(tmp_path / "body.pth"), ARCH, tmp_path / "port")
    variables, card = weights.load(tmp_path / "port")
    assert card.num_classes == 0
    assert "fc" not in variables["params"]
    to_torch(tmp_path / "port", tmp_path / "again.pth")
    assert torch.load(tmp_path / "again.pth").keys() == BODY.keys()
    assert verify(tmp_path / "port", str(tmp_path / "body.pth"), image_size=32) == 0
    assert verify(tmp_path / "port", str(SAMPLE), image_size=32) == 1
    said = capsys.readouterr().out.splitlines()
    assert "resnet10_w16, no head, " in said[0]
    assert "strict=False) takes it, for it has no head" in said[1]
    assert said[3] == "logits       none, there is no head"
    assert said[4].endswith("differing: fc.bias, fc.weight")


def test_parity_gives_weights_without_a_head_torchs_own(tmp_path: Path, monkeypatch) -> None:
    torch.save(BODY, tmp_path / "body.pth")
    seen = []
    monkeypatch.setattr(parity, "compare", lambda options, model, torch_model: seen.append(torch_model) or iter(()))
    assert parity.run(parity.Options(ARCH), str(tmp_path / "body.pth")) == []
    (model,) = seen
    assert model.fc.weight.shape == (parity.NUM_CLASSES, 128)
    assert torch.equal(model.layer4[0].conv2.weight, REAL["layer4.0.conv2.weight"])


def test_the_command_expands_homes_and_escapes_what_a_file_is_called(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(REAL, tmp_path / "x\x1b[31m.pth")

    def convert(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["convert", *arguments])
        return main()

    assert convert("to-flax", "~/x\x1b[31m.pth", "--arch", ARCH, "--out", "~/port") == 0
    assert capsys.readouterr().out.endswith("tensors of x\\x1b[31m.pth\n")
    assert convert("to-torch", "~/port", "--out", "~/again.safetensors") == 0
    assert safetensors.torch.load_file(tmp_path / "again.safetensors").keys() == REAL.keys()
    for arguments, said in (
        (("to-torch", "~/port", "--out", "~/again.PTH"), "neither .pth nor .safetensors"),
        (("to-torch", "~/port", "--out", "~/again.safetensors"), "again.safetensors exists"),
        (("to-torch", "~/port", "--out", f"~/{'x' * 300}.pth"), "can't be written: File name too long"),
        (("to-flax", str(SAMPLE), "--arch", ARCH, "--out", f"~/{'x' * 300}"), "can't be written: File name too long"),
        (("to-torch", "ftp://bucket/port", "--out", "a.pth"), "ftp:// is not known"),
        (("to-torch", "~/port", "--out", "ftp://bucket/a.pth"), "ftp:// is not known"),
        (("to-flax", "ftp://bucket/x.pth", "--arch", ARCH, "--out", "~/other"), "ftp:// is not known"),
        (("verify", "~/port", "--against", "~/absent.pth"), f"no file {tmp_path}/absent.pth"),
        (("verify", "~/port", "--against", "~/absent.pth", "--image-size", "8"), "the smallest is 32"),
    ):
        with pytest.raises(UserError, match=said):
            convert(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"x\x1b[31m.pth", "port", "again.safetensors"}


def test_half_a_head_does_not_fit(tmp_path: Path) -> None:
    torch.save({name: value for name, value in REAL.items() if name != "fc.bias"}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="do not fit resnet10_w16: missing: fc.bias"):
        to_flax(str(tmp_path / "x.pth"), ARCH, tmp_path / "port")


@pytest.mark.parametrize(
    "name", ["IMAGENET1K_V1", "imagenet1k_v1", "default", "ResNet18_Weights.IMAGENET1K_V1", "resnet18_weights.Default"]
)
def test_names_of_torchvisions_weights_in_any_case(tmp_path: Path, monkeypatch, name: str) -> None:
    asked = []
    torch.save(REAL, tmp_path / "x.pth")
    monkeypatch.setattr(checkpoints, "download", lambda url, _: asked.append(url) or tmp_path / "x.pth")
    _, card = checkpoints.read(name, "resnet18")
    assert card.weights_version == "IMAGENET1K_V1"
    assert asked == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]


@pytest.mark.parametrize("name", ["ResNet50_Weights.IMAGENET1K_V1", "IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V9"])
def test_names_of_other_weights_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"resnet18 has no weights '{name}'; did you mean 'IMAGENET1K_V1'"):
        checkpoints.read(name, "resnet18")
