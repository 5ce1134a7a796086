"""What a compiled program says of itself in HLO's text: its kernels, the bytes they move, their products, collectives.

A scheduled module names every array with its type, and XLA:GPU launches one kernel for each instruction of its entry
computation that is more than a name for an array. What a kernel reads and writes is then its operands and results:
exact where each is passed over once, as in XLA's own kernels, and a lower bound for a library's. Caches are not seen.
A TPU's inner memory is: arrays there, and the copies into it, are named as such (`in_main_memory`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
ELSEWHERE = re.compile(r"\b[a-z]\w*\[[\d,]*\]\{[^{}]*S\([1-9]\d*\)\}")  # an array of a memory space but the main one
NOTHING = "pred[0]"
EXTENT = re.compile(r"\[(\d+):(\d+)")
HEAD = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r" +(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<result>.*?) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<operands>[^)]*)\)(?P<rest>.*)"
)
COMMENT = re.compile(r"/\*.*?\*/")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CONVOLUTION = re.compile(r'custom_call_target="__cudnn\$conv(\w+)"')
LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
NAMES_ONLY = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
ENCLOSING = {"while", "conditional", "call"}  # what they call is launched kernel by kernel
PARTS = {"slice", "dynamic-slice", "gather"}  # read no more of their first operand than they give


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    result: str  # its type, as HLO writes it
    opcode: str
    operands: tuple[str, ...]  # names; of a parameter its number
    rest: str  # attributes
    is_root: bool


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A module: its computations by name, and which of them is run."""

    computations: dict[str, Computation]
    entry: str


class Counts(NamedTuple):
    """What one run of a program costs."""

    kernels: int  # launched once each: a loop's count once
    bytes: int  # read and written
    flops: int  # of convolutions and matrix products, two a multiplication
    layout_changes: int  # kernels that turn or copy what a convolution takes or gives


def parse(text: str) -> Program:
    """The program of an HLO module's text."""
    computations: dict[str, Computation] = {}
    entry = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            computations[head["name"]] = {}
            entry = head["name"] if head["entry"] else entry
            current = computations[head["name"]]
        elif computations and (found := INSTRUCTION.match(line)):
            operands = tuple(re.findall(r"[\w.-]+", COMMENT.sub("", found["operands"])))
            current[found["name"]] = Instruction(
                found["name"], found["result"], found["opcode"], operands, found["rest"], bool(found["root"])
            )
    return Program(computations, entry)


def counts(text: str) -> Counts:
    """The kernels of a scheduled module's text, with what they move and multiply."""
    program = parse(text)
    moved = multiplied = number = 0
    seen: dict[str, Computation] = {}
    for name, times in running(program, program.entry):
        computation = seen[name] = program.computations[name]
        for kernel in filter(is_kernel, computation.values()):
            number += 1
            moved += times * bytes_moved(program, computation, kernel)
            multiplied += times * flops(program, computation, kernel)
    return Counts(number, moved, multiplied, sum(len(layout_changes(program, found)) for found in seen.values()))


def in_main_memory(text: str) -> str:
    """A scheduled module's text with every array empty that lies in another memory, such as a TPU core's own."""
    return ELSEWHERE.sub(NOTHING, text)


def running(program: Program, name: str, times: int = 1) -> Iterator[tuple[str, int]]:
    """The computations whose instructions are launched one by one, and how often each runs, where that is known.

    Of a condition's branches all are counted.
    """
    yield name, times
    for instruction in program.computations[name].values():
        if instruction.opcode in ENCLOSING:
            trips = TRIPS.search(instruction.rest)
            for called in called_by(instruction):
                yield from running(program, called, times * (int(trips[1]) if trips else 1))


def called_by(instruction: Instruction) -> list[str]:
    """The names of the computations that an instruction calls."""
    found = CALLED.findall(instruction.rest)
    return [name for one, several in found for name in re.findall(r"[\w.-]+", one or several)]


def is_kernel(instruction: Instruction) -> bool:
    """Whether something is launched: of an asynchronous pair the start."""
    return instruction.opcode not in NAMES_ONLY | ENCLOSING and not instruction.opcode.endswith("-done")


def bytes_moved(program: Program, computation: Computation, kernel: Instruction) -> int:
    """What a kernel reads and writes."""
    read = sum(bytes_read(program, computation, kernel, name) for name in dict.fromkeys(kernel.operands))
    if kernel.opcode == "slice-start":  # a copy of a part
        source = computation[kernel.operands[0]].result
        extents = [int(last) - int(first) for first, last in EXTENT.findall(kernel.rest)]
        part = math.prod(extents) * size(source) // max(math.prod(shape(source)), 1)
        return part + size(kernel.result) - size(source)  # the result names what is copied, and the copy
    if kernel.opcode.endswith("-start"):  # some name their operands in the result again
        return size(kernel.result) if kernel.opcode == "copy-start" else max(2 * read, size(kernel.result))
    return read + bytes_written(program, computation, kernel)


def bytes_read(program: Program, computation: Computation, user: Instruction, name: str) -> int:
    """What `user` reads of its operand `name`: a slice its part; an update in place what it adds to."""
    whole = size(computation[name].result) if name in computation else 0
    if user.opcode == "fusion":
        inside = program.computations[called_by(user)[0]]
        numbers = {str(number) for number, operand in enumerate(user.operands) if operand == name}
        own = {i.name for i in inside.values() if i.opcode == "parameter" and i.operands[0] in numbers}
        used = [(i, operand) for i in inside.values() for operand in set(i.operands) & own]
        return min(whole, sum(bytes_read(program, inside, i, operand) for i, operand in used))
    if user.operands.index(name) == 0:
        if user.opcode in PARTS:
            return min(whole, size(user.result))
        if user.opcode == "dynamic-update-slice":
            return 0
        if user.opcode == "scatter":
            return min(whole, size(computation[user.operands[2]].result))
    return whole


def bytes_written(program: Program, computation: Computation, instruction: Instruction) -> int:
    """The results of an instruction; of an update in place what is new."""
    if instruction.opcode == "fusion":
        inside = program.computations[called_by(instruction)[0]]
        root = next(i for i in inside.values() if i.is_root)
        return bytes_written(program, inside, root)
    if instruction.opcode in ("tuple", "bitcast"):
        return sum(bytes_written(program, computation, computation[name]) for name in instruction.operands)
    if instruction.opcode == "dynamic-update-slice":
        return size(computation[instruction.operands[1]].result)
    if instruction.opcode == "scatter":
        return min(size(instruction.result), size(computation[instruction.operands[2]].result))
    return size(instruction.result)


def flops(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Of the convolutions and matrix products in an instruction, at two a multiplication, with those by padding."""
    if instruction.opcode == "fusion":
        inside = program.computations[called_by(instruction)[0]]
        return sum(flops(program, inside, i) for i in inside.values())
    shapes = [shape(computation[name].result) for name in instruction.operands if name in computation]
    result = shape(instruction.result)
    if kind := convolution_of(instruction):
        output, kernel = {"BackwardFilter": (shapes[1], result), "BackwardInput": (shapes[0], shapes[1])}.get(
            kind, (result, shapes[1])
        )
        labels = LABELS.search(instruction.rest)
        assert labels, instruction.rest
        return 2 * math.prod(output) * math.prod(kernel) // kernel[labels[1].index("o")]
    if (instruction.opcode == "dot" or "__cublas$" in instruction.rest) and (
        found := CONTRACTED.search(instruction.rest)
    ):
        contracted = [shapes[0][int(axis)] for axis in re.findall(r"\d+", found[1])]
        return 2 * math.prod(result) * math.prod(contracted)
    return 0


def convolution_of(instruction: Instruction) -> str:
    """'Forward', 'BackwardInput', 'BackwardFilter' and the like, or '' for what is no convolution."""
    if instruction.opcode == "convolution":
        return "Forward"
    found = CONVOLUTION.search(instruction.rest) if instruction.opcode == "custom-call" else None
    return found[1] if found else ""


def layout_changes(program: Program, computation: Computation) -> set[str]:
    """The kernels that turn or copy an operand or a result of a convolution, and do no product themselves."""

    def source(name: str) -> Instruction:
        instruction = computation[name]
        while instruction.opcode in ("bitcast", "get-tuple-element"):
            instruction = computation[instruction.operands[0]]
        return instruction

    def turns(instruction: Instruction) -> bool:
        if instruction.opcode != "fusion":
            return instruction.opcode in ("copy", "transpose")
        opcodes = {i.opcode for i in program.computations[called_by(instruction)[0]].values()}
        return bool(opcodes & {"copy", "transpose"}) and "dot" not in opcodes

    found = set()
    for kernel in filter(is_kernel, computation.values()):
        sources = [source(name) for name in kernel.operands]
        if convolution_of(kernel):
            found |= {i.name for i in sources if turns(i)}
        elif turns(kernel) and any(map(convolution_of, sources)):
            found.add(kernel.name)
    return found


def collectives_of(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results)} of a compiled program's HLO text."""
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            count, total = found.get(match["name"], (0, 0))
            found[match["name"]] = count + 1, total + size(match["result"])
    return found


def size(result: str) -> int:
    """The bytes of a type, such as f32[8,4]{1,0} or a tuple of such."""
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * width(kind) for kind, dims in ARRAY.findall(result))


def shape(result: str) -> list[int]:
    """The sides of the first array of a type."""
    found = ARRAY.search(result)
    return [int(side) for side in found[2].split(",") if side] if found else []


def width(kind: str) -> int:
    """The bytes of a value of an HLO type such as f32, bf16, s8 or pred."""
    bits = re.search(r"\d+", kind)
    return max(int(bits[0]) // 8, 1) if bits else 1
