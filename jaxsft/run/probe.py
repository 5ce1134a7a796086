"""What comes before the first update where the head trains alone: its features are kept, or a probe makes the head."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.data.base import Source
from jaxsft.data.reading import EvalPlan, TrainPlan
from jaxsft.interpret.metrics import Evaluation
from jaxsft.learn.alone import step_alone
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import make_schedule
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_several
from jaxsft.models.head import Head
from jaxsft.run.evaluation import evaluate
from jaxsft.run.features import Keeper

if TYPE_CHECKING:
    from jaxsft.run.job import Job

# Of a probe that comes before fine-tuning: nothing about the body or about images, and a rule of its own, for that of
# the whole network, perhaps AdamW with its decay, is chosen for another purpose.
ALONE = {
    "train.method": "full", "train.mixup": 0.0, "train.cutmix": 0.0, "train.ema": 0.0, "model.freeze": (),
    "optim.name": "sgd", "optim.momentum": 0.9, "optim.nesterov": False, "optim.weight_decay": 0.0,
    "optim.clip_norm": 0.0, "optim.schedule": "cosine", "optim.warmup_epochs": 0.0, "optim.layer_decay": 1.0,
    "optim.lr_multipliers": (),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Probe:
    """A head that is trained alone, on features that are kept; called with a job and the step that it starts after."""

    model: nn.Module
    head: Head
    eval_source: Source
    optimizer: optax.GradientTransformation  # of the whole network, all but the head frozen in it
    step_of: Callable[..., Any]  # `job.train_step_of`

    def __call__(self, job: Job, start: int) -> None:
        """Let `job` train and be evaluated on features: its loaders and steps are put in place.

        The state stays the whole network's: what is frozen in it goes through a step as it is.
        """
        began, parallel = time.perf_counter(), job.parallel
        for loader in (job.train_loader, job.eval_loader):
            loader.close()
        keeper = keeper_of(job, self.model, self.head)
        training = keeper.kept(job.train_source, "training", substitute=True)
        evaluated = keeper.kept(self.eval_source, "evaluation")
        job.train_loader = keeper.loader(training, TrainPlan(job.order))
        job.eval_loader = keeper.loader(evaluated, EvalPlan(len(evaluated), job.config.data.batch_size))
        make = lambda optimizer: self.step_of(job.config, self.head, optimizer, None, parallel.axis_name)
        body = step_alone(make, self.optimizer, self.head.layer)
        job.train_step = parallel.compile(body, donate_first=True)
        job.several_steps = parallel.compile(make_several(body), donate_first=True)
        job.eval_step = parallel.compile(make_eval_step(self.head, None, axis_name=parallel.axis_name))
        if parallel.is_main:
            count, seconds = len(training) + len(evaluated), time.perf_counter() - began
            cli.say(f"features of {count} images computed in {seconds:.1f} s")


@dataclasses.dataclass(frozen=True)
class ProbeFirst:
    """A probe from whose head fine-tuning starts (LP-FT, arXiv:2202.10054): a part of making the initial state."""

    model: nn.Module
    head: Head
    state_of: Callable[[Any], TrainState]  # variables -> the state before the first update, on the devices
    step_of: Callable[..., Any]  # `job.train_step_of`

    def __call__(self, job: Job, start: int) -> None:
        """Put the probe's head into the state of `job`, unless that has begun: its checkpoint has it then."""
        if start:
            return
        began = time.perf_counter()
        head, result = self.train(job)
        variables = jax.device_get(job.state.variables())
        variables["params"] = {**variables["params"], self.head.layer: head}
        job.state = self.state_of(variables)
        if job.parallel.is_main:
            seconds = time.perf_counter() - began
            cli.say(f"probe: {result.summary()} on the features of the training images, {seconds:.1f} s")

    def train(self, job: Job) -> tuple[Any, Evaluation]:
        """The head after the probe, on the host, and what it makes of the features that it was trained on."""
        config, parallel, path = alone(job.config), job.parallel, self.head.layer
        steps = max(round(config.train.probe_epochs * job.order.steps_per_epoch), 1)
        keeper = keeper_of(job, self.model, self.head)
        kept = keeper.kept(job.train_source, "training", substitute=True)
        params = {path: jax.device_get(job.state.params[path])}
        optimizer = make_optimizer(config, params, make_schedule(config, job.order.steps_per_epoch, steps))
        state = parallel.replicate(TrainState.create({"params": params}, optimizer, with_average=False))
        body = self.step_of(config, self.head, optimizer, None, parallel.axis_name)
        update, loader = parallel.compile(body, donate_first=True), keeper.loader(kept, TrainPlan(job.order))
        for step in range(steps):
            state, _ = update(state, loader.dataset, loader.batch(step))
        eval_step = parallel.compile(make_eval_step(self.head, None, axis_name=parallel.axis_name))
        every = keeper.loader(kept, EvalPlan(len(kept), config.data.batch_size))
        return jax.device_get(state.params[path]), evaluate(eval_step, state.variables(), every)


def alone(config: ConfigDict) -> ConfigDict:
    """The settings of a probe before fine-tuning: the config's own but for ALONE, at the probe's rate.

    The default of that, 0.1, is from CIFAR-10 and a ResNet-18 that had seen seven of its classes, 20 epochs in batches
    of 50: 0.673 on the test images after 250 images and 0.714 after 2,500 (0.3: 0.675 and 0.724; 0.01: 0.642 and
    0.687). Its features were 5 long; longer ones want a smaller rate rather than a larger.
    """
    own = config.copy_and_resolve_references().unlock()
    own.update_from_flattened_dict({**ALONE, "optim.lr": config.train.probe_lr})
    return own


def keeper_of(job: Job, model: nn.Module, head: Head) -> Keeper:
    """What keeps the features of the body that is in the state of `job`."""
    variables, preprocessing = job.state.variables(), job.card.preprocessing
    return Keeper(job.config, model, head.layer, variables, preprocessing, job.parallel, job.bad_files)
