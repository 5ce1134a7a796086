"""Make the report on a run, or one that shows several side by side: a page to be opened without server or network.

python -m jaxsft.report --workdir DIR [DIR ...] [--out FILE.html] [--checkpoint last|best|STEP]
                        [--data SOURCE --split SPLIT --data-dir DIR]

Of one run it is report.html in its folder, as the end of training leaves it; of several --out says where. Each run is
evaluated, on its own images or on others (--data), as `python -m jaxsft.evaluate` does. Where the images can't be had
any more, the report says so and shows the rest. A source that a config file registers is known once that file is
loaded: --config FILE.
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew

import argparse

from jaxsft import cli, storage
from jaxsft.flags import parse_flags
from jaxsft.interpret.report import comparison, single
from jaxsft.run.machine import keep_compilations
from jaxsft.run.reporting import REPORT, check_run, of_workdir


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, nargs="+", type=storage.location, metavar="DIR")
    parser.add_argument("--out", type=storage.location, help=f"default: {REPORT} in the run's folder")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: %(default)s")
    parser.add_argument("--data", default="", help="another source than the runs', such as tfds:cifar10")
    parser.add_argument("--split", default="", help="another split than the runs' eval_split")
    parser.add_argument("--data-dir", default="", help="of TFDS")
    parser.add_argument("--config", default="", help="a config file that registers the source")
    args = parser.parse_args()

    if args.out is None and len(args.workdir) > 1:
        raise cli.UserError("--out is missing: a report on several runs is no one's", "name it, as --out runs.html")
    out = args.workdir[0] / REPORT if args.out is None else args.out
    if args.config:
        parse_flags([f"--config={args.config}"], "", {})
    keep_compilations()
    for workdir in args.workdir:
        check_run(workdir)
    storage.check_writable(out)
    runs = [of_workdir(workdir, args.checkpoint, args.data, args.split, args.data_dir) for workdir in args.workdir]
    storage.write_file(out, single.report(runs[0]) if len(runs) == 1 else comparison.report(runs))
    cli.say(out)


if __name__ == "__main__":
    cli.run(main)
