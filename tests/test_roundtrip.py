"""torch -> Flax -> torch, bit for bit, through memory and through files, for every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from convert import checkpoints, names
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import variable_shapes
from tests.oracle import ALL, LIGHT, unfilled

SIGN, INFINITY, LAST_OF_EXPONENT = np.uint32(1 << 31), np.uint32(255 << 23), np.uint32(1 << 23)


def random_bits(arch: str, usable: bool = False) -> dict[str, np.ndarray]:
    """A state_dict of random bits: denormal numbers, infinities and NaNs with payloads too; counters of 31 bits.

    No number is special to a converter that only moves them. With `usable` they are what files are read with: finite,
    and no variance is negative.
    """
    model = unfilled(arch)
    rng = np.random.default_rng(0)
    tensors = dict(family_of(arch).constants(arch))  # which a port must find as they are
    for name, value in model.state_dict().items():
        if name in tensors:
            continue
        if value.dtype == torch.int64:
            tensors[name] = np.array(rng.integers(2**31), np.int64)
        else:
            bits = np.frombuffer(rng.bytes(4 * value.numel()), np.uint32).copy()
            if usable:
                bits[(bits & INFINITY) == INFINITY] ^= LAST_OF_EXPONENT
                bits &= ~SIGN if name.endswith("running_var") else ~np.uint32(0)
            tensors[name] = bits.view(np.float32).reshape(value.shape)
    return tensors


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def there_and_back(tensors: dict[str, np.ndarray], arch: str) -> dict[str, np.ndarray]:
    return names.to_torch(names.to_flax(tensors, variable_shapes(ARCHITECTURES[arch]()), arch), arch)


@pytest.mark.parametrize("arch", LIGHT)
def test_memory(arch: str) -> None:
    tensors = random_bits(arch)
    assert_same_bits(there_and_back(tensors, arch), tensors)


def check_files(arch: str, folder: Path) -> None:
    tensors = random_bits(arch, usable=True)
    torch_model = getattr(torchvision.models, arch)()
    for suffix in (".pth", ".safetensors"):
        path, again = folder / f"in{suffix}", folder / f"out{suffix}"
        checkpoints.write(path, tensors)
        found, _ = checkpoints.read(str(path), arch)
        checkpoints.write(again, there_and_back(found, arch))
        if suffix == ".pth":
            loaded = torch.load(again, weights_only=True)
        else:
            from safetensors.torch import load_file

            loaded = load_file(again)
        torch_model.load_state_dict(loaded, strict=True)
        assert_same_bits({name: value.numpy() for name, value in torch_model.state_dict().items()}, tensors)
        path.unlink()
        again.unlink()


@pytest.mark.parametrize("arch", ["resnet18"])
def test_files(arch: str, tmp_path: Path) -> None:
    check_files(arch, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("arch", ALL)
def test_files_of_all(arch: str, tmp_path: Path) -> None:
    check_files(arch, tmp_path)
