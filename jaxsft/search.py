"""Choose settings: by cross-validation, a range test of the learning rate, or a search through a space of them.

python -m jaxsft.search --config FILE[:VARIANT] --folds K [--workdir DIR] [--json FILE] [--config.KEY=VALUE ...]
python -m jaxsft.search --config FILE[:VARIANT] --lr-range[=LOW:HIGH] ...
python -m jaxsft.search --config FILE[:VARIANT] --space FILE --trials N [--folds K] ...

All of it happens within the training split; the split to evaluate on is never looked at. The same command again goes
on. --workdir defaults to runs/<config file>[-<variant>] with -folds, -lr-range or -search behind it.
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew
    machine.collect_seldom()
    machine.announce_start()

import sys
from pathlib import Path

from jaxsft import cli, flags, output, recipes, storage, streams
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.tune import folds, range_test, space, trials

FEWEST_FOLDS = 2
OPTIONS = {
    "workdir": "where all of it lies",
    "folds": "K: train K runs, each evaluated on another K-th of the training images; with --space the same in a trial",
    "lr-range": f"LOW:HIGH: let the rate rise from LOW to HIGH, and say which to take; bare: {range_test.DEFAULT}",
    "space": "a Python file with SPACE = {'optim.lr': ('log', 1e-3, 1e-1), ...}; see docs/search.md",
    "trials": "N: how many to make with --space, in all processes together",
    "json": "write the result; -: on stdout",
}


def main() -> None:
    argv = [f"--lr-range={range_test.DEFAULT}" if word == "--lr-range" else word for word in with_values(sys.argv[1:])]
    assert __doc__ is not None
    config, values, config_flag = flags.parse_flags(argv, __doc__, OPTIONS)
    config_module.check(config)
    count = whole("folds", values["folds"], FEWEST_FOLDS) if values["folds"] else 0
    kinds = [name for name in ("space", "lr-range") if values[name]] or (["folds"] if count else [])
    if len(kinds) != 1 or (count and kinds == ["lr-range"]):
        raise UserError("what to search for is not said, or twice", "give one of --folds, --lr-range and --space")
    (kind,) = kinds
    if bool(values["trials"]) != (kind == "space"):
        raise UserError("--space and --trials belong together", "give both, or neither")
    suffix = "search" if kind == "space" else kind
    workdir = storage.location(values["workdir"] or Path("runs") / f"{recipes.run_name(config_flag)}-{suffix}")
    to_json = output.json_to(values["json"])
    with streams.unbreakable_streams():
        if kind == "folds":
            machine.keep_compilations()
            to_json(folds.cross_validate(config, workdir, count))
        elif kind == "lr-range":
            low, high = range_test.parse(values["lr-range"])
            machine.keep_compilations()
            to_json(range_test.range_test(config, workdir, low, high))
        else:
            number = whole("trials", values["trials"], 1)
            dimensions = space.load(values["space"], config)
            machine.keep_compilations()
            to_json(trials.search(config, config_flag, workdir, dimensions, number, count))


def with_values(argv: list[str]) -> list[str]:
    """The command line with `--lr-range LOW:HIGH` as one word."""
    words = list(argv)
    for place in reversed([i for i, word in enumerate(words[:-1]) if word == "--lr-range"]):
        if not words[place + 1].startswith("-"):
            words[place : place + 2] = [f"--lr-range={words[place + 1]}"]
    return words


def whole(name: str, text: str, least: int) -> int:
    """The number that an option gives. Raises UserError where it is none, or less than `least`."""
    try:
        value = flags.whole_number(text)
    except (ValueError, OverflowError):
        value = least - 1
    if value < least:
        raise UserError(f"--{name} is {text!r}", f"it must be a whole number, {least} or more")
    return value


if __name__ == "__main__":
    cli.run(main)
