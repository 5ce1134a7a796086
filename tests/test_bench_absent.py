"""What `bench gpu` counts of a schedule, by hand; and that both compilers compile for devices that are not here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxsft.bench import gpu, hlo
from tests.commands import assert_refused
from tests.conftest import ROOT

# As XLA:GPU writes a schedule: a kernel that turns a convolution's kernel, cuDNN, a fused mean of its output, a product
# by Triton, a loop that runs five times, an update in place and a slice.
SCHEDULE = """HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[]}, num_partitions=1

%fused_transpose (param_0: f32[3,3,8,16]) -> bf16[16,3,3,8] {
  %param_0 = f32[3,3,8,16]{3,2,1,0} parameter(0)
  %convert.1 = bf16[3,3,8,16]{3,2,1,0} convert(%param_0)
  ROOT %transpose.1 = bf16[16,3,3,8]{3,2,1,0} transpose(%convert.1), dimensions={3,0,1,2}
}

%fused_reduce (param_0.1: bf16[2,4,4,16], param_1.1: f32[16]) -> (f32[16], f32[16]) {
  %param_0.1 = bf16[2,4,4,16]{3,2,1,0} parameter(0), metadata={op_name="mean"}
  %convert.2 = f32[2,4,4,16]{3,2,1,0} convert(%param_0.1)
  %param_1.1 = f32[16]{0} parameter(1)
  %zero = f32[] constant(0)
  %reduce.1 = f32[16]{0} reduce(%convert.2, %zero), dimensions={0,1,2}, to_apply=%add
  %add.1 = f32[16]{0} add(%reduce.1, %param_1.1)
  ROOT %tuple.1 = (f32[16]{0}, f32[16]{0}) tuple(%reduce.1, %add.1)
}

%gemm_fusion_dot (parameter_0: bf16[32,16], parameter_1: bf16[32,16]) -> f32[16,16] {
  %parameter_0 = bf16[32,16]{1,0} parameter(0)
  %parameter_1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[16,16]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%fused_update (param_0.2: f32[100,16], param_1.2: f32[16], param_2.2: s32[]) -> f32[100,16] {
  %param_1.2 = f32[16]{0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %param_0.2 = f32[100,16]{1,0} parameter(0)
  %bitcast.2 = f32[1,16]{1,0} bitcast(%param_1.2)
  %zero.2 = s32[] constant(0)
  ROOT %dus = f32[100,16]{1,0} dynamic-update-slice(%param_0.2, %bitcast.2, %param_2.2, %zero.2)
}

%fused_slice (param_0.3: f32[100,16], param_1.3: s32[]) -> f32[16] {
  %param_0.3 = f32[100,16]{1,0} parameter(0)
  %param_1.3 = s32[] parameter(1)
  %zero.3 = s32[] constant(0)
  %slice.3 = f32[1,16]{1,0} dynamic-slice(%param_0.3, %param_1.3, %zero.3), dynamic_slice_sizes={1,16}
  ROOT %bitcast.3 = f32[16]{0} bitcast(%slice.3)
}

%body (carried: (s32[], f32[16])) -> (s32[], f32[16]) {
  %carried = (s32[], f32[16]{0}) parameter(0)
  %count = s32[] get-tuple-element(%carried), index=0
  %sum = f32[16]{0} get-tuple-element(%carried), index=1
  %doubled = f32[16]{0} add(%sum, %sum)
  ROOT %tuple.4 = (s32[], f32[16]{0}) tuple(%count, %doubled)
}

%condition (carried.1: (s32[], f32[16])) -> pred[] {
  %carried.1 = (s32[], f32[16]{0}) parameter(0)
  %count.1 = s32[] get-tuple-element(%carried.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%count.1, %five), direction=LT
}

%branch (other: f32[16]) -> f32[16] {
  %other = f32[16]{0} parameter(0)
  ROOT %negated = f32[16]{0} negate(%other)
}

ENTRY %main (x: bf16[2,4,4,8], kernel: f32[3,3,8,16], table: f32[100,16], row: s32[], chooses: pred[]) -> f32[100,16] {
  %x = bf16[2,4,4,8]{3,2,1,0} parameter(0), sharding={replicated}
  %kernel = f32[3,3,8,16]{3,2,1,0} parameter(1)
  %table = f32[100,16]{1,0} parameter(2)
  %row = s32[] parameter(3)
  %chooses = pred[] parameter(4)
  %input_transpose_fusion = bf16[16,3,3,8]{3,2,1,0} fusion(%kernel), kind=kInput, calls=%fused_transpose
  %conv = (bf16[2,4,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %input_transpose_fusion), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %z = bf16[2,4,4,16]{3,2,1,0} get-tuple-element(%conv), index=0
  %slice = f32[16]{0} fusion(%table, %row), kind=kLoop, calls=%fused_slice
  %mean = (f32[16]{0}, /*index=1*/f32[16]{0}) fusion(%z, /*index=1*/%slice), kind=kInput, calls=%fused_reduce
  %of_mean = f32[16]{0} get-tuple-element(%mean), index=1
  %flat = bf16[32,16]{1,0} bitcast(%z)
  %product = f32[16,16]{1,0} fusion(%flat, %flat), kind=kCustom, calls=%gemm_fusion_dot
  %zero.9 = s32[] constant(0)
  %start = (s32[], f32[16]{0}) tuple(%zero.9, %of_mean)
  %while = (s32[], f32[16]{0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %summed = f32[16]{0} get-tuple-element(%while), index=1
  %chosen = f32[16]{0} conditional(%chooses, %summed, %summed), true_computation=%branch, false_computation=%branch
  %all-reduce-start = f32[16]{0} all-reduce-start(%chosen), replica_groups={{0,1}}, to_apply=%add
  %all-reduce-done = f32[16]{0} all-reduce-done(%all-reduce-start)
  ROOT %updated = f32[100,16]{1,0} fusion(%table, %all-reduce-done, %row), kind=kLoop, calls=%fused_update
}
"""
KERNEL, X, Z, ROW = 3 * 3 * 8 * 16, 2 * 4 * 4 * 8, 2 * 4 * 4 * 16, 16 * 4
MOVED = {
    "turned": KERNEL * 4 + KERNEL * 2,
    "convolved": X * 2 + KERNEL * 2 + Z * 2,
    "sliced": ROW + 4 + ROW,  # a row of the table, and which
    "mean": Z * 2 + ROW + 2 * ROW,
    "product": Z * 2 + 16 * 16 * 4,  # an operand that it names twice is read once
    "loop": 5 * (ROW + ROW),
    "condition": 5 * (4 + 4 + 1),
    "a branch": 2 * ROW,
    "the other": 2 * ROW,
    "all-reduce": 2 * ROW,
    "updated": ROW + 4 + ROW,  # a row of the table is written, none read
}
# As libtpu writes one: an array brought into the core's own memory, S(1), a part of another beside it, what is made of
# both there, and its way back.
INNER = """HloModule jit_step, is_scheduled=true

%fused (param_0: bf16[8,128], param_1: bf16[2,128], param_2: f32[128]) -> bf16[8,128] {
  %param_0 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1 = bf16[2,128]{1,0:T(2,128)(2,1)S(1)} parameter(1)
  %param_2 = f32[128]{0:T(128)} parameter(2)
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%param_0, %param_1, %param_2)
}

ENTRY %main (x: bf16[8,128], y: bf16[6,128], b: f32[128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[6,128]{1,0:T(2,128)(2,1)} parameter(1)
  %b = f32[128]{0:T(128)} parameter(2)
  %copy-start = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %slice-start = ((bf16[6,128]{1,0:T(2,128)(2,1)}), bf16[2,128]{1,0:T(2,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%y), \
slice={[4:6], [0:128]}
  %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-done = bf16[2,128]{1,0:T(2,128)(2,1)S(1)} slice-done(%slice-start)
  %made = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%copy-done, %slice-done, %b), kind=kLoop, calls=%fused
  %back = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%made)
  ROOT %out.1 = bf16[8,128]{1,0:T(8,128)(2,1)} copy-done(%back)
}
"""
SMALL = ("--arch=resnet10_w16", "--image-size=32", "--batch-size=16")


def test_a_schedule_is_counted_as_by_hand() -> None:
    found = hlo.counts(SCHEDULE)
    assert found.bytes == sum(MOVED.values())
    assert found.kernels == len(MOVED)
    assert found.flops == 2 * Z * (3 * 3 * 8) + 2 * 16 * 16 * 32
    assert found.layout_changes == 1
    assert hlo.collectives_of(SCHEDULE) == {"all-reduce": (1, ROW)}


def test_what_passes_between_main_memory_and_a_core() -> None:
    x, part, b = 8 * 128 * 2, 2 * 128 * 2, 128 * 4
    assert hlo.counts(hlo.in_main_memory(INNER)).bytes == x + part + b + x
    both_ends = 4  # of a copy, whose context takes another four bytes
    assert hlo.counts(INNER).bytes == 2 * (2 * x + both_ends) + (2 * part + both_ends) + (x + part + b + x)
    assert hlo.in_main_memory(SCHEDULE) == SCHEDULE  # a GPU's arrays all lie there


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # dy, kernel -> dx; x, dy -> kernel; groups: a kernel sees four of the eight channels
        ('%r = (bf16[2,8,8,8]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %k), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"', 2 * Z * 72),  # noqa: E501
        ('%r = (bf16[16,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"', 2 * Z * 72),  # noqa: E501
        ('%r = (bf16[2,16,4,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), dim_labels=bf01_oi01->bf01, feature_group_count=2, custom_call_target="__cudnn$convForward"', 2 * Z * 36),  # noqa: E501
        ('%r = (f32[16,16]{1,0}, s8[0]{0}) custom-call(%a, %a), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}', 2 * 16 * 16 * 32),  # noqa: E501
        ("%r = f32[2,4,4,16]{3,2,1,0} convolution(%x, %h), window={size=3x3 stride=2x2}, dim_labels=b01f_01io->b01f", 2 * Z * 72),  # noqa: E501
        ("%r = f32[16,16]{1,0} add(%a, %a)", 0),
    ],
)  # fmt: skip
def test_the_flops_of_every_product(line: str, flops: int) -> None:
    """Those of a convolution are its own whichever way it goes: each pixel of its output times its kernel."""
    operands = {"x": "bf16[2,8,8,8]", "dy": "bf16[2,4,4,16]", "k": "bf16[16,3,3,8]", "g": "bf16[16,4,3,3]",
                "h": "bf16[3,3,8,16]", "a": "bf16[32,16]"}  # fmt: skip
    parameters = "\n".join(f"  %{name} = {kind} parameter({i})" for i, (name, kind) in enumerate(operands.items()))
    assert hlo.counts(f"ENTRY %main () -> f32[] {{\n{parameters}\n  ROOT {line}\n}}\n").flops == flops


def test_without_the_plugin_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(
        "bench gpu --json @/a.json", "jax-cuda12-plugin is not installed; pip install jax-cuda12-...", tmp_path
    )
    assert not list(tmp_path.iterdir())


def compiled(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "jaxsft.bench", "gpu", *SMALL, *arguments, "--json=-"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.full
@pytest.mark.parametrize("card", gpu.CARDS)
def test_compiles_for_cards_that_are_not_here(card: str) -> None:
    """Of two cards each takes half of the images and all gradients are reduced; float32 moves more than bfloat16."""
    pytest.importorskip("jax_cuda12_plugin")
    one, two = compiled(f"--gpu={card}"), compiled(f"--gpu={card}", "--cards=2")
    assert 0.45 < two["flops_per_step"] / one["flops_per_step"] < 0.55
    assert not one["collectives"] and two["collective_bytes_per_step"] >= two["gradient_bytes"]
    wide = compiled(f"--gpu={card}", "--precision=float32", "--matmul-precision=highest")
    assert wide["bytes_per_step"] > one["bytes_per_step"]
    assert min(one["temp_bytes"], one["kernels"], one["layout_changes"], one["roofline_seconds"]) > 0


@pytest.mark.full
def test_a_batch_that_no_card_holds() -> None:
    pytest.importorskip("jax_cuda12_plugin")
    command = [sys.executable, "-m", "jaxsft.bench", "gpu", *SMALL[:1], "--image-size=224", "--batch-size=131072"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "error: a batch of 131072 does not fit (it takes " in done.stderr.splitlines()[-1]
