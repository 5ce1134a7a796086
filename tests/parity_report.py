"""Write tests/PARITY.md: the comparison of torchvision's networks, one line each, from `python -m jaxsft.parity`.

    python -m tests.parity_report [--arch ARCH ...] [--dtype float64 float32] [--steps 10] [--image-size 32]
    python -m tests.parity_report --results FILE ...

Lines that are there stay until their comparison is made again, so that the table can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxsft.models import resnet
from tests.oracle import ALL

TARGET = Path(__file__).parent / "PARITY.md"
HEAD = """# Parity with PyTorch

`python -m jaxsft.parity --arch ARCH --dtype DTYPE` on values drawn so that each of them shows in the result: the
largest |ours - torch's| of any tensor over the largest |torch's| of that tensor (float32 gradients and momentum, and
gradients that batch norm takes away: of all tensors). "Activations": every module with parameters and every block, in
evaluation and in training, where dropout and stochastic depth drop the same on both sides. "Training": the worst after
any step of two runs of SGD, with and without Nesterov: loss, parameters, momentum, running statistics. Counters,
accuracy and the weights' round trip are equal, bit for bit. In float32 a gradient jumps where ReLU decides a rounding
of zero in the other way (where none does it is held to 1e-2); float64 shows that nothing but rounding is behind it.

"""
COLUMNS = {  # column -> pattern of the names of its rows
    "activations": r"(eval|train)/(activation/.*|logits)",
    "losses": r"train/loss/.*",
    "gradients": r"train/gradient.*/.*",
    "training: loss": r".*/step \d+/loss|.*/evaluation/loss",
    "parameters": r".*/step \d+/parameter/.*",
    "momentum": r".*/step \d+/momentum/.*",
    "statistics": r".*/running_(mean|var)/.*",
}
RESNETS = tuple(arch for arch in ALL if arch in resnet.ARCHITECTURES)
# One of each family, and all of the first.
SHOWN = (
    *RESNETS, "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_y_400mf", "densenet121", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "shufflenet_v2_x0_5",
)  # fmt: skip
KEY = ("arch", "dtype", "input", "steps")


def line(result: dict) -> list[str]:
    """The cells of one comparison."""
    height, width = result["image_size"]
    cells = [result["arch"], result["dtype"], f"{result['batch_size']} x {height} x {width}", str(result["steps"])]
    cells.append(str(len(result["rows"])))
    for pattern in COLUMNS.values():
        values = [row["relative"] for row in result["rows"] if re.fullmatch(pattern, row["name"])]
        cells.append("-" if not values else "differs" if None in values else f"{max(values):.0e}")
    return [*cells, "passed" if result["passed"] else "**failed**"]


def table(lines: list[list[str]]) -> str:
    """Markdown."""
    head = [*KEY, "compared", *COLUMNS, "result"]
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read(path: Path) -> list[list[str]]:
    """The lines of a table written before."""
    text = path.read_text() if path.exists() else ""
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]
    return cells[2:]


def compare(arch: str, dtype: str, steps: int, image_size: str) -> dict:
    """Run the command; its status 1 is a result, any other failure is raised."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        options = {"--arch": arch, "--dtype": dtype, "--steps": steps, "--image-size": image_size, "--json": path}
        arguments = [str(part) for pair in options.items() for part in pair]
        done = subprocess.run([sys.executable, "-m", "jaxsft.parity", *arguments], stdout=subprocess.PIPE, check=False)
        if done.returncode not in (0, 1) or not path.exists():
            raise RuntimeError(f"python -m jaxsft.parity {' '.join(arguments)} ended with {done.returncode}")
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=SHOWN, choices=ALL)
    parser.add_argument("--dtype", nargs="+", default=("float64", "float32"), choices=("float64", "float32"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--image-size", default="32")
    parser.add_argument("--results", nargs="+", type=Path, help="files of `--json`: take these, compare nothing")
    args = parser.parse_args()
    if args.results:
        for path in args.results:
            write(json.loads(path.read_text()))
        return
    for dtype in args.dtype:
        for arch in args.arch:
            write(compare(arch, dtype, args.steps, args.image_size))


def write(result: dict) -> None:
    """Put one comparison into the table, in the place of an earlier one of the same kind."""
    versions = ", ".join(" ".join(pair) for pair in result["versions"].items())
    versions += f", on 1 x {result['device']}; the last line of {result['date']}.\n"
    new = line(result)
    lines = [row for row in read(TARGET) if row[: len(KEY)] != new[: len(KEY)]] + [new]
    lines.sort(key=lambda row: (ALL.index(row[0]) if row[0] in ALL else len(ALL), row[1:]))
    TARGET.write_text(HEAD + table(lines) + f"\nMade by `python -m tests.parity_report`: {versions}")
    print(" ".join(new), flush=True)


if __name__ == "__main__":
    main()
