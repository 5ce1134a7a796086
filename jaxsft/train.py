"""Fine-tune a model as a config file says.

python -m jaxsft.train --config configs/cifar10.py[:VARIANT] [--workdir DIR] [--config.KEY=VALUE ...]

The same command again resumes; a finished run says so. --workdir defaults to runs/<config file>[-<variant>].
Several machines: TPU pods, Slurm, MPI and Kubernetes are recognised (docs/clusters.md); elsewhere start the same
command on each with --coordinator HOST:PORT --num-processes N --process-id K (K from 0; HOST is the machine of 0).
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew
    machine.collect_seldom()
    machine.announce_start()

import sys
from pathlib import Path

from jaxsft import cli, flags, recipes, storage, streams
from jaxsft import config as config_module
from jaxsft.run import parameters, processes, profile
from jaxsft.run import workdir as workdir_module
from jaxsft.run.training import train


def main() -> None:
    options = {
        "workdir": "where the run lies; default runs/<config file>[-<variant>]",
        "checkpoint": "of a run given as config.model.weights: last, best or a step",
        "print-parameters": "print what trains, from when, at which rate and with which decay, and do nothing else",
        **profile.OPTIONS,
        **processes.OPTIONS,
    }
    assert __doc__ is not None
    config, values, config_flag = flags.parse_flags(sys.argv[1:], __doc__, options, switches=["print-parameters"])
    workdir = storage.location(values["workdir"] or Path("runs") / recipes.run_name(config_flag))
    if values["checkpoint"]:
        config.model.checkpoint = values["checkpoint"]
    config_module.check(config)
    if values["print-parameters"]:
        cli.write_output(sys.stdout, "".join(f"{line}\n" for line in parameters.lines(config)))
        return
    profile_steps = profile.steps_of(values["profile"])
    workdir_module.check(workdir, config)
    machine.keep_compilations()
    with streams.unbreakable_streams(), processes.join(values, config.parallel.timeout_seconds):
        train(config, workdir, profile_steps)


if __name__ == "__main__":
    cli.run(main)
