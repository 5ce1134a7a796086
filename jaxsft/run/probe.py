"""What comes before the first update where the head trains alone: its features are kept, or a probe makes the head."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.data.base import Source
from jaxsft.data.reading import EvalPlan, TrainPlan
from jaxsft.interpret.multilabel import Result
from jaxsft.learn.schedule import make_schedule
from jaxsft.models.families import family_of
from jaxsft.models.head import Head, head_of
from jaxsft.run.evaluation import evaluate
from jaxsft.run.features import Keeper
from jaxsft.run.program import Program

if TYPE_CHECKING:
    from jaxsft.run.job import Job

# Of a probe that comes before fine-tuning: nothing about the body or about images, and a rule of its own, for that of
# the whole network, perhaps AdamW with its decay, is chosen for another purpose.
ALONE = {
    "train.method": "full", "train.mixup": 0.0, "train.cutmix": 0.0, "train.ema": 0.0, "train.swa_epochs": 0,
    "train.teacher": "", "data.unlabelled": "", "model.freeze": (), "model.unfreeze": (),
    "optim.name": "sgd", "optim.momentum": 0.9, "optim.nesterov": False, "optim.weight_decay": 0.0, "optim.l2_sp": 0.0,
    "optim.clip_norm": 0.0, "optim.sam": 0.0, "optim.schedule": "cosine", "optim.schedule_by": "step",
    "optim.warmup_epochs": 0.0, "optim.warmup_steps": None, "optim.lr_scaling": "none", "optim.layer_decay": 1.0,
    "optim.lr_multipliers": (),
}  # fmt: skip


def beginning(program: Program, variables: Any, eval_source: Source) -> tuple[Callable[[Job, int], None], str]:
    """What is done before the first update, as train.method says, and what a line about the run has of it.

    Raises:
      UserError: the network has no output layer that trains alone.
    """
    train, model = program.config.train, program.config.model
    keeps = train.method == "probe" and train.keep_features
    if not keeps and train.method != "lp-ft":
        return lambda job, start: None, ""
    head = head_of(program.model, family_of(model.arch).head, variables, program.config.data.image_size)
    if keeps:
        return Probe(program, head, eval_source), "features kept: no augmentation"
    return ProbeFirst(program, head), f"a probe of {train.probe_epochs:g} epochs first"


@dataclasses.dataclass(frozen=True)
class Probe:
    """A head that is trained alone, on features that are kept; called with a job and the step that it starts after."""

    program: Program  # of the whole network, all but the head frozen in it
    head: Head
    eval_source: Source

    def __call__(self, job: Job, start: int) -> None:
        """Let `job` train and be evaluated on features: its loaders and steps are put in place.

        The state stays the whole network's: what is frozen in it goes through a step as it is, also its batch
        statistics, which no average need estimate.
        """
        began = time.perf_counter()
        for loader in (job.train_loader, job.eval_loader):
            loader.close()
        keeper = keeper_of(job, self.program, self.head)
        training = keeper.kept(job.train_source, "training", substitute=True)
        evaluated = keeper.kept(self.eval_source, "evaluation")
        job.train_loader = keeper.loader(training, TrainPlan(job.order))
        job.eval_loader = keeper.loader(evaluated, EvalPlan(len(evaluated), job.config.data.batch_size))
        alone = self.program.of_head(self.head)
        job.train_loader.dataset = alone.dataset(job.train_loader.dataset)
        _, job.train_step, job.several_steps = alone.phases()[0]
        job.eval_step, job.statistics_step = alone.evaluation(), None
        if job.parallel.is_main:
            count, seconds = len(training) + len(evaluated), time.perf_counter() - began
            cli.say(f"features of {count} images computed in {seconds:.1f} s")


@dataclasses.dataclass(frozen=True)
class ProbeFirst:
    """A probe from whose head fine-tuning starts (LP-FT, arXiv:2202.10054): a part of making the initial state."""

    program: Program
    head: Head

    def __call__(self, job: Job, start: int) -> None:
        """Put the probe's head into the state of `job`, unless that has begun: its checkpoint has it then."""
        if start:
            return
        began = time.perf_counter()
        head, result = self.train(job)
        variables = jax.device_get(job.state.variables())
        variables["params"] = {**variables["params"], self.head.layer: head}
        job.state = self.program.state(variables)
        if job.parallel.is_main:
            seconds = time.perf_counter() - began
            cli.say(f"probe: {result.summary()} on the features of the training images, {seconds:.1f} s")

    def train(self, job: Job) -> tuple[Any, Result]:
        """The head after the probe, on the host, and what it makes of the features that it was trained on."""
        config, path, every = alone(job.config), self.head.layer, job.order.steps_per_epoch
        total = max(round(config.train.probe_epochs * every), 1)
        params, rate = {path: jax.device_get(job.state.params[path])}, make_schedule(config, every, total)
        program = dataclasses.replace(
            self.program.of_head(self.head), config=config, params=params, rate=rate, total=total
        )
        keeper = keeper_of(job, self.program, self.head)
        kept = keeper.kept(job.train_source, "training", substitute=True)
        state, loader = program.state({"params": params}), keeper.loader(kept, TrainPlan(job.order))
        loader.dataset, update = program.dataset(loader.dataset), program.phases()[0].train_step
        for step in range(total):
            state, _ = update(state, loader.dataset, loader.batch(step))
        examples = keeper.loader(kept, EvalPlan(len(kept), config.data.batch_size))
        result = evaluate(program.evaluation(), state.variables(), examples, job.card)
        return jax.device_get(state.params[path]), result


def alone(config: ConfigDict) -> ConfigDict:
    """The settings of a probe before fine-tuning: the config's own but for ALONE, at the probe's rate.

    The default of that, 0.1, is from CIFAR-10 and a ResNet-18 that had seen seven of its classes, 20 epochs in batches
    of 50: 0.673 on the test images after 250 images and 0.714 after 2,500 (0.3: 0.675 and 0.724; 0.01: 0.642 and
    0.687). Its features were 5 long; longer ones want a smaller rate rather than a larger.
    """
    own = config.copy_and_resolve_references().unlock()
    own.update_from_flattened_dict({**ALONE, "optim.lr": config.train.probe_lr})
    return own


def keeper_of(job: Job, program: Program, head: Head) -> Keeper:
    """What keeps the features of the body that is in the state of `job`."""
    variables, preprocessing = job.state.variables(), job.card.preprocessing
    return Keeper(job.config, program.model, head.layer, variables, preprocessing, job.parallel, job.bad_files)
