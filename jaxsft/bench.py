"""Measure: nothing here is timed in tests.

python -m jaxsft.bench data [--against torch] [--folder PATH] [--image-size 224] [--workers 2] [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxsft import cli
from jaxsft.data import bench as data

COMMANDS = {"data": data}  # name -> module with add_arguments(parser) and run(args) -> what --json writes


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--json", type=Path, help="write the result")
    args = parser.parse_args()
    record = COMMANDS[args.command].run(args)
    if args.json:
        cli.write_json(args.json, record)


if __name__ == "__main__":
    cli.run(main)
