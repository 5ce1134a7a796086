"""Measure how fast training, evaluation and the loading of images are, how well methods learn, what a run is worth.

python -m jaxsft.bench train [--against torch] [--arch resnet18] [--image-size 224] [--batch-size 32] [--json FILE]
python -m jaxsft.bench run   [--config configs/cifar10.py:sample] [--json FILE]
python -m jaxsft.bench job   --weights FILE.pth [--work cifar|photos] [--against torch] [--json FILE]
python -m jaxsft.bench data  [--against torch] [--folder PATH] [--image-size 224] [--arch resnet18] [--json FILE]
python -m jaxsft.bench predict [--against torch] [--images 500] [--arch resnet18] [--workers 2] [--json FILE]
python -m jaxsft.bench tpu   [--topology v5e:2x2] [--arch resnet50] [--batch-size 512] [--json FILE]
python -m jaxsft.bench gpu   [--gpu h100|a100] [--cards 1] [--arch resnet50] [--batch-size 128] [--json FILE]
python -m jaxsft.bench methods --weights FILE.pth [--against torch] [--methods full ema …] [--json FILE]
python -m jaxsft.bench ship  --workdir DIR … [--json FILE]
python -m jaxsft.bench serve [--workdir RUN] [--against torch] [--requests 2000] [--clients 32] [--json FILE]
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew

import argparse

from jaxsft import cli, output
from jaxsft.bench import data, gpu, job, methods, predict, run, serve, ship, tpu, train

COMMANDS = {
    "train": train,
    "run": run,
    "job": job,
    "data": data,
    "predict": predict,
    "tpu": tpu,
    "gpu": gpu,
    "methods": methods,
    "ship": ship,
    "serve": serve,
}  # modules with add_arguments(parser) and run(args) -> JSON


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--json", type=output.json_to, default="", help="write the result; -: on stdout")
    args = parser.parse_args()
    args.json(COMMANDS[args.command].run(args))


if __name__ == "__main__":
    cli.run(main)
