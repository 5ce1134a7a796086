"""Answer over HTTP what is on pictures, by a checkpoint of a run; with a page to drop them on.

python -m jaxsft.serve --workdir DIR [--port 8000] [--host 127.0.0.1] [--checkpoint last|best|STEP]

    curl -F file=@cat.jpg http://127.0.0.1:8000/predict

Only this machine reaches it, unless --host says otherwise: it asks nobody for a password. SIGTERM and Ctrl-C stop it
from taking more; what it has taken it answers, and ends with status 0, or with 1 where that took too long.
/health says whether it answers, /metrics what it counts for Prometheus, /docs and /openapi.json how to ask.
"""

from __future__ import annotations

from jaxsft.run import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew

import argparse
import contextlib
import os
import sys
import threading

from jaxsft import cli, storage
from jaxsft.bench.step import missing
from jaxsft.run.machine import keep_compilations
from jaxsft.run.saved import load_run
from jaxsft.ship.limits import Limits
from jaxsft.ship.predictor import Predictor

DEFAULT = Limits()


def main() -> int:
    args = arguments()
    limits = Limits(
        max_batch=args.max_batch,
        max_wait=args.max_wait_ms / 1000,
        queue=args.queue,
        max_bytes=args.max_mb * 1e6,
        max_pixels=args.max_pixels,
        timeout=args.timeout_s,
        topk=args.topk,
    )
    try:
        from jaxsft.ship import listener, server
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("jaxsft"):
            raise
        raise missing(error.name.partition(".")[0], "serve") from None
    keep_compilations()
    with listener.bind(args.host, args.port, limits.timeout) as listening:
        if not listener.is_loopback(listening):
            cli.warn("whoever reaches this machine can use it: there is no password, and no encryption")
        run = load_run(args.workdir, args.checkpoint)
        predictor = Predictor(
            run.model,
            run.variables,
            run.card,
            limits,
            step=run.step,
            upright=run.config.data.exif_orientation,
            matmul_precision=run.config.train.matmul_precision,
        )
        application = server.app(predictor)
        house = application.state.house
        serving = listener.make_server(application, limits, on_signal=house.end)
        failures: list[BaseException] = []
        url = listener.url_of(listening)

        def open_() -> None:
            try:
                predictor.open()
            except BaseException as error:
                failures.append(error)
                serving.should_exit = True
            else:
                with contextlib.suppress(cli.Stop, BrokenPipeError):  # nobody need read it
                    cli.say(f"serving {run.card.arch} of step {run.step}, {len(run.card.names)} classes, on {url}")

        opening = threading.Thread(target=open_, name="opening", daemon=True)
        opening.start()
        serving.run(sockets=[listening])
    if failures:
        raise failures[0]
    predictor.close(limits.graceful)
    status = cli.FAILED if house.cut else 0
    if house.cut:
        cli.warn(f"{house.cut} requests were left without their answer")
    if opening.is_alive():  # a compiler can't be told to stop, and must not outlive the interpreter
        sys.stdout.flush()
        os._exit(status)
    return status


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(
        prog="python -m jaxsft.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=storage.location)
    parser.add_argument("--checkpoint", default="last", help="last, best or a step (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (default: %(default)s)")
    parser.add_argument(
        "--max-batch", type=int, default=DEFAULT.max_batch, help="images computed together (default: %(default)s)"
    )
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=1000 * DEFAULT.max_wait,
        help="how long the first of them waits for others (default: %(default)g)",
    )
    parser.add_argument(
        "--queue", type=int, default=DEFAULT.queue, help="requests in work; more are refused (default: %(default)s)"
    )
    parser.add_argument(
        "--max-mb", type=float, default=DEFAULT.max_bytes / 1e6, help="of a request's body (default: %(default)g)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=DEFAULT.max_pixels, help="of a picture (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=DEFAULT.timeout,
        help="for a body to come, and the answer (default: %(default)g)",
    )
    parser.add_argument("--topk", type=int, default=DEFAULT.topk, help="classes an answer (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
