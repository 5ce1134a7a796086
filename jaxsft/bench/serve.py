"""A service under load, with clients of all kinds: are its answers right, how long do they take, does its memory grow?

And the same pictures by the same network behind torch and FastAPI, as people write it, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

import jaxsft
from convert import checkpoints, names
from jaxsft import cli, storage
from jaxsft.bench import serve_client
from jaxsft.bench.serve_client import Outcome, Request
from jaxsft.bench.step import above_zero, missing, whole
from jaxsft.data.base import Options
from jaxsft.data.embedded import open_sample
from jaxsft.models.families import ARCHITECTURES

# (width, height, format) of the pictures
PICTURES = (
    (32, 32, "PNG"),
    (224, 224, "JPEG"),
    (500, 375, "JPEG"),
    (375, 500, "PNG"),
    (640, 480, "WEBP"),
    (1024, 768, "JPEG"),
)
COPIES = 4  # pictures of each size
MIX = 4  # one request of so many can't be answered
PATIENT = 30  # of so many of those one is slow: a slow one holds its client for seconds
CLOSE = 1e-4  # of a probability: batches of other sizes are summed in another order
START = 600.0  # seconds in which a service must be up
MOMENTS = 8  # at which its memory is looked at
ROUNDS = 3  # turns of each in the comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench serve`."""
    parser.add_argument("--workdir", type=storage.location, help="a run; default: one of one step is made and removed")
    parser.add_argument("--arch", default="resnet18", choices=list(ARCHITECTURES), metavar="ARCH", help="of that one")
    parser.add_argument("--image-size", type=whole, default=224, help="px, of that one; default: %(default)s")
    parser.add_argument("--requests", type=whole, default=2000, help="default: %(default)s")
    parser.add_argument("--clients", type=whole, default=32, help="requests at a time; default: %(default)s")
    parser.add_argument("--max-mb", type=above_zero, default=20.0, help="of a body; default: %(default)s")
    parser.add_argument("--timeout-s", type=above_zero, default=5.0, help="as jaxsft.serve's; default: %(default)s")
    parser.add_argument("--against", choices=("torch",), help="torch and FastAPI too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return it.

    Returns:
      "mixed": of all requests together, "answers" (statuses by kind of request) and "wrong" (those that are not as they
      must be); "rss_mb" of the service at MOMENTS; "good": p50, p99 (ms) and requests a second of pictures alone, and
      with `--against` of torch's, and the "ratio" of ours to them; "exit_status" of the service after SIGTERM;
      "passed": no answer was wrong, and it ended with 0.

    Raises:
      UserError: there is no such run, or a package is missing.
    """
    for package in ("fastapi", "uvicorn", *(["torchvision"] if args.against else [])):
        try:
            __import__(package)
        except ImportError:
            raise missing(package, "torch" if package == "torchvision" else "serve") from None
    with tempfile.TemporaryDirectory(prefix="jaxsft-bench-") as folder:
        place = Path(folder)
        loaded = jaxsft.load(args.workdir or one_step(args, place / "run"))
        contents = pictures()
        expected = loaded.predict([PIL.Image.open(io.BytesIO(content)) for content in contents], topk=1)
        options = [f"--max-mb={args.max_mb}", f"--timeout-s={args.timeout_s}", "--port=0"]
        with service("jaxsft.serve", f"--workdir={loaded.workdir}", *options) as (process, address):
            record: dict[str, Any] = {"arch": loaded.card.arch, "requests": args.requests, "clients": args.clients}
            record.update(mixed(args, contents, expected, process, address))
            tell_mixed(record)
            contestants = {"jaxsft": address}
            with contextlib.ExitStack() as stack:
                if args.against:
                    checkpoints.write(place / "w.pth", names.to_torch(loaded.variables, loaded.card.arch))
                    loaded.card.save(place)
                    other = [f"--weights={place / 'w.pth'}", f"--card={place / 'model.json'}"]
                    contestants[args.against] = stack.enter_context(service("jaxsft.bench.serve_reference", *other))[1]
                record["good"] = in_turns(args, contents, contestants)
            tell_good(record["good"])
            process.send_signal(signal.SIGTERM)
            record["exit_status"] = process.wait(60)
    record["passed"] = not record["mixed"]["wrong"] and record["exit_status"] == 0
    cli.say(f"ended with {record['exit_status']} after SIGTERM; {'passed' if record['passed'] else 'FAILED'}")
    return record


def one_step(args: argparse.Namespace, workdir: Path) -> Path:
    """A run of one step, from scratch, on the sample."""
    config = {
        "model.arch": args.arch,
        "model.weights": "",
        "data.image_size": args.image_size,
        "data.batch_size": 8,
        "data.train_split": "train[:8]",
        "data.eval_split": "test[:8]",
        "train.steps": 1,
        "optim.warmup_epochs": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    cli.run_module("jaxsft.train", "--config=configs/cifar10.py:sample", *flags, f"--workdir={workdir}")
    return workdir


def pictures() -> list[bytes]:
    """Files of the sample's images, enlarged, with the noise of a photograph."""
    source = open_sample("", "test[:100]", Options())
    noise, made = np.random.default_rng(0), []
    for i, (width, height, kind) in enumerate(PICTURES * COPIES):
        image = PIL.Image.fromarray(source.images[i]).resize((width, height), PIL.Image.Resampling.BICUBIC)
        levels = np.asarray(image, np.float32) + noise.normal(0, 6, (height, width, 1))
        out = io.BytesIO()
        PIL.Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(out, kind)
        made.append(out.getvalue())
    return made


@contextlib.contextmanager
def service(*command: str) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    """A process of `python -m COMMAND...` that says where it serves, and its address; ended afterwards."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    kill = threading.Timer(START, process.kill)
    kill.start()
    try:
        assert process.stdout is not None
        said = next((line for line in process.stdout if "serving" in line), "")
        kill.cancel()
        if not said:
            raise cli.Stop(f"{command[0]} ended with {process.wait()} before it served", "see what it says above")
        url = urllib.parse.urlsplit(said.split()[-1])
        yield process, (str(url.hostname), int(url.port or 0))
    finally:
        kill.cancel()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def plan(args: argparse.Namespace, contents: Sequence[bytes]) -> list[Request]:
    """Requests of all kinds in a random order, the same for every run."""
    drawn = random.Random(0)
    fine = [*serve_client.good(contents, True), *serve_client.good(contents, False)]
    others = serve_client.bad(contents[1], int(args.max_mb * 1e6), args.timeout_s)
    slow = [one for one in others if one.kind.startswith("slow")]
    fast = [one for one in others if one not in slow]
    made = []
    for i in range(args.requests):
        if i % MIX:
            made.append(fine[i % len(fine)])
        else:
            number = i // MIX
            made.append(slow[number // PATIENT % len(slow)] if number % PATIENT == 0 else fast[number % len(fast)])
    drawn.shuffle(made)
    return made


def mixed(
    args: argparse.Namespace,
    contents: Sequence[bytes],
    expected: Sequence[dict[str, Any]],
    process: subprocess.Popen[str],
    address: tuple[str, int],
) -> dict[str, Any]:
    """Requests of all kinds: "mixed" and "rss_mb" of the record."""
    requests, memory = plan(args, contents), [rss_mb(process.pid)]
    every = max(len(requests) // MOMENTS, 1)

    def look(done: int) -> None:
        if done % every == 0:
            memory.append(rss_mb(process.pid))

    began = time.perf_counter()
    outcomes = asyncio.run(serve_client.load(*address, requests, args.clients, look))
    seconds = time.perf_counter() - began
    wrong = [said for outcome in outcomes if (said := complaint(outcome, expected))]
    answers: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        answers.setdefault(outcome.request.kind, Counter())[str(outcome.status)] += 1
    fine = [outcome for outcome in outcomes if outcome.request.picture >= 0]
    record = {"answers": answers, "wrong": wrong, **summary(fine, seconds), "all_per_second": len(outcomes) / seconds}
    return {"mixed": record, "rss_mb": memory}


def complaint(outcome: Outcome, expected: Sequence[dict[str, Any]]) -> str:
    """What is wrong with an answer; '' for one that is right."""
    request = outcome.request
    if not outcome.right:
        return f"{request.kind}: {outcome.status} {outcome.answer} {outcome.why}"
    if request.picture < 0:
        return ""
    want, found = expected[request.picture]["classes"][0], outcome.answer["classes"]
    ours = next((entry for entry in found if entry["class"] == want["class"]), None)
    if ours is None or abs(ours["probability"] - want["probability"]) > CLOSE:
        return f"{request.kind}, picture {request.picture}: {found}, `predict` says {want}"
    return ""


def in_turns(
    args: argparse.Namespace, contents: Sequence[bytes], contestants: dict[str, tuple[str, int]]
) -> dict[str, Any]:
    """Pictures alone, sent as forms to each in ROUNDS turns: of every measure the median of the rounds."""
    fine = serve_client.good(contents, True)
    requests = [fine[i % len(fine)] for i in range(max(args.requests // ROUNDS, args.clients))]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    best: dict[str, dict[int, str]] = {name: {} for name in contestants}
    for address in contestants.values():
        asyncio.run(serve_client.load(*address, fine, args.clients))  # each warms up
    for _ in range(ROUNDS):
        for name, address in contestants.items():
            began = time.perf_counter()
            outcomes = asyncio.run(serve_client.load(*address, requests, args.clients))
            rounds[name].append(summary(outcomes, time.perf_counter() - began))
            for outcome in outcomes:
                if outcome.status == 200:
                    best[name][outcome.request.picture] = outcome.answer["classes"][0]["class"]
    record: dict[str, Any] = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in rounds.items()
    }
    if len(contestants) > 1:
        (ours, mine), (theirs, other) = ((name, best[name]) for name in contestants)
        record["ratio"] = {key: record[ours][key] / record[theirs][key] for key in ("p50_ms", "p99_ms", "per_second")}
        record["same_class"] = sum(mine.get(i) == other.get(i) for i in range(len(contents))) / len(contents)
    return record


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, float]:
    """Times of the answered ones in ms, how many there were a second, and how many had none."""
    times = [1000 * outcome.seconds for outcome in outcomes if outcome.status == 200]
    p50, p99 = np.percentile(times, (50, 99)).tolist() if times else (float("nan"),) * 2
    return {
        "p50_ms": p50,
        "p99_ms": p99,
        "max_ms": max(times, default=float("nan")),
        "per_second": len(times) / seconds,
        "failed": len(outcomes) - len(times),
    }


def rss_mb(process: int) -> float:
    """Memory of a process that is in RAM, in MB; NaN where the system does not say (no Linux)."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e3
    return float("nan")


def tell_mixed(record: dict[str, Any]) -> None:
    """Print what requests of all kinds found."""
    found = record["mixed"]
    for kind, statuses in sorted(found["answers"].items()):
        said = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
        cli.say(f"  {kind:26} {said}".replace(" x 0", " x no answer"))
    for wrong in found["wrong"][:20]:
        cli.say(f"  WRONG {wrong}"[:500])
    memory = " ".join(f"{value:.0f}" for value in record["rss_mb"])
    cli.say(f"all kinds: p50 {found['p50_ms']:.0f} ms, p99 {found['p99_ms']:.0f} ms of pictures; RSS {memory} MB")


def tell_good(found: dict[str, Any]) -> None:
    """Print the comparison."""
    for name, row in found.items():
        if isinstance(row, dict) and "failed" in row:
            said = f"p50 {row['p50_ms']:.1f} ms  p99 {row['p99_ms']:.1f} ms  {row['per_second']:.1f}/s"
            cli.say(f"pictures alone, {name:8} {said}  failed {row['failed']:.0f}")
    if "ratio" in found:
        said = "  ".join(f"{key} {value:.2f}" for key, value in found["ratio"].items())
        cli.say(f"ratio, jaxsft over torch: {said}; the same class {found['same_class']:.0%}")
