"""The range test of the learning rate (Smith 2015, arXiv:1506.01186): a short training whose rate rises all the time.

The rate rises by the same factor with each update, from LOW to HIGH, until the loss is DIVERGED times its least. What
is looked at is the mean of all losses so far, weighted by SMOOTHING ** age, as fastai's `lr_find` does; the proposals
have fastai's names, and the one that is made is fastai's default.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import matplotlib.figure
import numpy as np
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.allowed import above
from jaxsft.cli import UserError
from jaxsft.output import write_json
from jaxsft.run.numbers import KEY, numbers_of
from jaxsft.run.prepare import prepare
from jaxsft.run.shared import Shared
from jaxsft.storage import Location
from jaxsft.tune import place
from jaxsft.tune.loop import training_losses
from jaxsft.tune.pictures import save
from jaxsft.tune.pool import open_pool, part

DEFAULT = "1e-6:10"
UPDATES = 100  # where train.steps does not say
SMOOTHING, DIVERGED = 0.98, 4.0
FEWEST = 10  # losses that a proposal can be made of
LAST = 5  # updates that are left out at the end; at the start it is a tenth
CHOSEN = "valley"


@dataclasses.dataclass(frozen=True)
class Curve:
    """The rate of each update, the loss of its batch before it, and the smoothed loss; float64 [N]."""

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray


def parse(text: str) -> tuple[float, float]:
    """The two ends of 'LOW:HIGH'.

    Raises:
      UserError: it is not two numbers above 0 in their order.
    """
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = 0.0, 0.0
    if not (above(0).admits(low) and above(0).admits(high) and low < high):
        raise UserError(f"--lr-range is {text!r}", f"it must be LOW:HIGH, two rates above 0, such as {DEFAULT}")
    return low, high


def range_test(config: ConfigDict, workdir: Location, low: float, high: float) -> dict[str, Any]:
    """Make the test, write lr_range.json and lr_range.png, and say which rate it proposes.

    Returns:
      What lr_range.json has: "proposal" (the rate of CHOSEN), "proposals" {name: rate}, "rates", "losses" and
      "smoothed", a number an update.

    Raises:
      UserError: the config, the data or the folder do not allow it, or the loss diverges at once.
    """
    wanted = place.purpose(config, "lr-range", low=low, high=high)
    place.check(workdir, wanted)
    config = config.copy_and_resolve_references()
    config.train.steps = config.train.steps or UPDATES
    config.optim.warmup_epochs = 0.0
    with place.ours(workdir, wanted):
        curve = measure(config, rising(low, high, config.train.steps))
        found = proposals(curve)
        curves = {field.name: getattr(curve, field.name).tolist() for field in dataclasses.fields(Curve)}
        result = {"proposal": found[CHOSEN], "proposals": found, **curves}
        write_json(workdir / "lr_range.json", result)
        save(picture(curve, found), workdir / "lr_range.png")
    end = len(curve.rates)
    why = "the end of the range" if end == config.train.steps else f"a loss of {DIVERGED:g} times the least"
    cli.say(f"{workdir}: {end} updates, rates {low:g} to {curve.rates[-1]:.3g}, {why}")
    cli.say("  ".join(f"{name} {rate:.2g}" for name, rate in found.items()))
    cli.say(f"--config.optim.lr={found[CHOSEN]:.2g} is proposed ({CHOSEN}); see {workdir / 'lr_range.png'}")
    return result


def rising(low: float, high: float, updates: int) -> np.ndarray:
    """Rates from `low` to `high`, each the same multiple of the one before; float32 [updates]."""
    return np.geomspace(low, high, updates).astype(np.float32)


def measure(config: ConfigDict, rates: np.ndarray) -> Curve:
    """Train at these rates, until the smoothed loss is DIVERGED times its least, or no number any more."""
    pool, shared = open_pool(config, 2, used=()), Shared()
    whole = part(pool.source, np.arange(len(pool.source), dtype=np.int32))
    job, said = prepare(config, (whole, whole), shared)
    cli.say(said.partition("; ")[0])
    numbers = job.parallel.replicate(numbers_of(config, rates, job.order.steps_per_epoch))
    job.train_loader.dataset = {**job.train_loader.dataset, KEY: numbers}
    losses: list[float] = []
    smooth: list[float] = []
    mean = 0.0
    for loss in training_losses(job):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        value = mean / (1 - SMOOTHING ** (len(losses) + 1))
        if not math.isfinite(value):
            break
        losses.append(loss)
        smooth.append(value)
        if value > DIVERGED * min(smooth):
            break
    return Curve(rates[: len(losses)].astype(np.float64), np.array(losses), np.array(smooth))


def proposals(curve: Curve) -> dict[str, float]:
    """Rates to train at: 'valley', 'steepest' and 'minimum/10', as fastai's SuggestionMethod has them.

    'valley': the smoothed losses that fall from one to the next, in the longest such choice of them, are followed back
    from the last by as many updates as they are; the proposal is the rate in the middle. 'steepest': where the smoothed
    loss falls most for the logarithm of the rate. 'minimum/10': a tenth of the rate at which it is least. The first
    tenth of the updates, whose loss is noise, and the last LAST, at which it explodes, do not count.

    Raises:
      UserError: there are too few.
    """
    first = len(curve.rates) // 10
    rates, losses = curve.rates[first:-LAST], curve.smoothed[first:-LAST]
    if len(rates) < FEWEST:
        raise UserError(
            f"the loss has diverged after {len(curve.rates)} updates",
            "give a lower --lr-range, or more --config.train.steps",
        )
    slopes = np.diff(losses) / np.diff(np.log(rates))
    return {
        "valley": float(rates[valley(losses)]),
        "steepest": float(rates[np.argmin(slopes)]),
        "minimum/10": float(rates[np.argmin(losses)] / 10),
    }


def valley(losses: np.ndarray) -> int:
    """The place of the proposal 'valley'; see `proposals`."""
    lengths = np.ones(len(losses), np.int64)  # of the longest falling choice that ends here
    for i in range(1, len(losses)):
        before = lengths[:i][losses[:i] > losses[i]]
        lengths[i] = 1 + before.max(initial=0)
    end = int(lengths.argmax())
    start = max(end - int(lengths[end]), 0)
    third = (end - start) / 3
    return start + int(third) + int(third / 2)


def picture(curve: Curve, found: dict[str, float]) -> matplotlib.figure.Figure:
    """The losses over the rates, and the proposals."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, color="0.8", linewidth=1, label="of each batch")
    axes.plot(curve.rates, curve.smoothed, linewidth=1.6, label="smoothed")
    for (name, rate), marker in zip(found.items(), "osD", strict=True):
        loss = np.interp(math.log(rate), np.log(curve.rates), curve.smoothed)
        size, color = (9, "C3") if name == CHOSEN else (6, "C1")
        axes.plot([rate], [loss], marker, label=f"{name}: {rate:.2g}", markersize=size, color=color)
    least, most = min(curve.smoothed.min(), curve.losses.min()), curve.smoothed[0]
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(0.9 * least, max(1.5 * most, 1.1 * least)))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
