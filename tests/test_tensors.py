"""What is taken for weights: plain, finite, floating numbers; and every other tensor, refused by its name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from convert import checkpoints
from jaxsft.cli import UserError
from jaxsft.data.embedded import WEIGHTS as SAMPLE

ARCH = "resnet10_w16"
REAL = safetensors.torch.load_file(SAMPLE)
KERNEL, VARIANCE, COUNT = "layer1.0.conv1.weight", "bn1.running_var", "bn1.num_batches_tracked"
NAN, INFINITY = float("nan"), float("inf")


def with_one(name: str, value: float) -> torch.Tensor:
    """The real tensor but for one number."""
    changed = REAL[name].clone()
    changed.view(-1)[3] = value
    return changed


# what is wrong -> (the tensor's name, what stands there, what is said)
WRONG = {
    "NaN": (KERNEL, with_one(KERNEL, NAN), "NaN"),
    "infinity": (KERNEL, with_one(KERNEL, -INFINITY), "infinity"),
    "NaN in half precision": (KERNEL, with_one(KERNEL, NAN).bfloat16(), "NaN"),
    "more than float32 has": (KERNEL, with_one(KERNEL, 1).double() * 1e39, "too large for float32"),
    "complex": (KERNEL, REAL[KERNEL].to(torch.complex64), "holds complex64"),
    "integers": (KERNEL, REAL[KERNEL].round().long(), "holds int64"),
    "bools": (KERNEL, REAL[KERNEL] > 0, "holds bool"),
    "bytes": ("fc.bias", REAL["fc.bias"].to(torch.uint8), "holds uint8"),
    "a negative variance": (VARIANCE, with_one(VARIANCE, -1e-9), "variance below 0"),
    "half a count": (COUNT, torch.tensor(0.5), "holds float32"),
    "a count that is true": (COUNT, torch.tensor(True), "holds bool"),
    "a negative count": (COUNT, torch.tensor(-1), "counts below 0"),
    "a count beyond 31 bits": (COUNT, torch.tensor(2**31), "31 bits"),
    "float8": (KERNEL, REAL[KERNEL].to(torch.float8_e4m3fn), "holds float8_e4m3fn"),
    "float8 of exponents": (KERNEL, REAL[KERNEL].abs().to(torch.float8_e8m0fnu), "holds float8_e8m0fnu"),
    "float4": (KERNEL, torch.zeros(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "holds float4_e2m1fn_x2"),
    "sparse": (KERNEL, REAL[KERNEL].to_sparse(), "is a sparse tensor"),
    "compressed sparse": ("fc.weight", REAL["fc.weight"].to_sparse_csr(), "is a sparse_csr tensor"),
    "blocked sparse": ("fc.weight", REAL["fc.weight"].to_sparse_bsr((1, 1)), "is a sparse_bsr tensor"),
    "quantised": (KERNEL, torch.quantize_per_tensor(REAL[KERNEL], 0.1, 0, torch.qint8), "is a quantized tensor"),
    "meta": (KERNEL, torch.zeros(2**34, device="meta"), "is a meta tensor"),
    "an expanded view": (KERNEL, torch.zeros(1).expand(2**32), "asks for 17,179,869,184 bytes of the 4 there are"),
    "overlapping rows": ("fc.weight", torch.zeros(9).as_strided((7, 8), (0, 1)), "asks for 224 bytes of the 36"),
    "nested": (KERNEL, torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "is a nested tensor"),
    "a list": ("fc.bias", [0.0] * 7, "is a list, not a tensor"),
    "numpy's array": ("fc.bias", np.zeros(7, np.float32), "is a _reconstruct, not a tensor"),
    "a number": ("fc.bias", 1, "is a int, not a tensor"),
    "text": ("fc.bias", "zeros", "is a str, not a tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_tensor_is_refused_by_its_name(tmp_path: Path, wrong: str) -> None:
    name, value, said = WRONG[wrong]
    torch.save({**REAL, name: value}, tmp_path / "x.pth")
    with pytest.raises(UserError) as error:
        checkpoints.read(str(tmp_path / "x.pth"), ARCH)
    assert f"{name!r} " in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_dtype_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in REAL.items()}
    torch.save(tensors, tmp_path / "x.pth")
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    for suffix in (".pth", ".safetensors"):
        found, _ = checkpoints.read(str(tmp_path / f"x{suffix}"), ARCH)
        for name, value in tensors.items():
            expected = (value.float() if value.is_floating_point() else value).numpy()
            assert (found[name].dtype, found[name].tobytes()) == (expected.dtype, expected.tobytes()), name


def test_views_that_need_no_more_than_there_is_are_read(tmp_path: Path) -> None:
    views = {
        KERNEL: REAL[KERNEL].to(memory_format=torch.channels_last),
        "fc.weight": REAL["fc.weight"].t().contiguous().t(),
        "fc.bias": torch.cat([REAL["fc.bias"], torch.ones(5)])[:7],
    }
    torch.save({**REAL, **views}, tmp_path / "x.pth")
    found, _ = checkpoints.read(str(tmp_path / "x.pth"), ARCH)
    for name in views:
        np.testing.assert_array_equal(found[name], REAL[name].numpy())


def safe_file(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), end: int = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


TWICE = b'{"a": %s, "\\u0061": %s}'.replace(b"%s", json.dumps(entry()).encode())
# what is wrong -> (header, bytes of data, what is said)
WRONG_SAFETENSORS = {
    "float8": ({"a": entry("F8_E4M3", (4,))}, 4, "'a' holds F8_E4M3"),
    "float8 of another kind": ({"a": entry("F8_E5M2", (4,))}, 4, "'a' holds F8_E5M2"),
    "float4": ({"a": entry("F4", (8,))}, 4, "'a' holds F4"),
    "float6": ({"a": entry("F6_E2M3", (4,), 3)}, 3, "'a' holds F6_E2M3"),
    "complex": ({"a": entry("C64", (1,), 8)}, 8, "'a' holds complex64"),
    "integers": ({"a": entry("I32")}, 4, "'a' holds int32"),
    "an unknown dtype": ({"a": entry("X9")}, 4, "not a whole .safetensors file"),
    "a name twice": (TWICE, 4, "'a' twice"),
    "a huge shape": ({"a": entry(shape=(2**40, 2**40))}, 4, "not a whole .safetensors file"),
    "a huge shape that fits": ({"a": entry(shape=(0, 2**62, 2**62), end=0)}, 0, "not a whole .safetensors file"),
    "a large shape": ({"a": entry(shape=(2**32,), end=2**34)}, 4, "not a whole .safetensors file"),
    "a hundred axes": ({"a": entry(shape=(1,) * 100)}, 4, "not a whole .safetensors file"),
    "a negative size": ({"a": entry(shape=(-1,))}, 4, "not a whole .safetensors file"),
    "nothing": ({}, 0, "holds no tensors"),
    "deep nesting": (b'{"a":' * 100_000, 0, "not a whole .safetensors file"),
}


@pytest.mark.parametrize("wrong", WRONG_SAFETENSORS)
def test_a_wrong_safetensors_file_is_refused(tmp_path: Path, wrong: str) -> None:
    header, size, said = WRONG_SAFETENSORS[wrong]
    safe_file(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(UserError) as error:
        checkpoints.read(str(tmp_path / "x.safetensors"), ARCH)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_safetensors_with_values_that_are_none_are_refused(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in REAL.items()}
    for value, said in ((NAN, "NaN"), (1e39, "too large for float32")):
        changed = arrays["fc.bias"].astype(np.float64)
        changed[0] = value
        safetensors.numpy.save_file({**arrays, "fc.bias": changed}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=f"'fc.bias' holds.*{said}"):
            checkpoints.read(str(tmp_path / "x.safetensors"), ARCH)
    half = torch.full((7,), INFINITY, dtype=torch.bfloat16)
    safetensors.torch.save_file({"fc.bias": half}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="'fc.bias' holds NaN, an infinity"):
        checkpoints.read(str(tmp_path / "x.safetensors"), ARCH)
