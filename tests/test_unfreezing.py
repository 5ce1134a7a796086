"""Gradual unfreezing: what waits stands still bit for bit, begins as torch's does, and a killed run does the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import traverse_util

from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.learn import trainable
from jaxsft.learn.objective import Inputs, Objective
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_train_step
from jaxsft.parity.oracle import nchw
from jaxsft.run import prepare as prepare_module
from jaxsft.run import pretrained
from jaxsft.run.prepare import prepare
from jaxsft.run.program import at_epoch
from tests import small, tiny
from tests.tiny import Tiny, compiled

LR, DECAY, CLIP, BATCH, PER_EPOCH = 0.1, 0.05, 0.5, 16, 2
# Of `Tiny`: the head trains, then the norm, then all; two updates each.
FREEZE, UNFREEZE = ("^conv1", "^bn1"), (("^bn1", 1.0), ("^conv1", 2.0))
MODULES = ("fc", "bn1", "conv1")


def phases_of(name: str) -> list[tuple[optax.GradientTransformation, Any]]:
    """The optimizer and the compiled step of each phase."""
    config = config_module.default()
    config.optim.update({"name": name, "weight_decay": DECAY, "clip_norm": CLIP})
    config.model.update({"freeze": FREEZE, "unfreeze": UNFREEZE})
    params, found = tiny.variables()["params"], []
    rules = trainable.rules(config, params)
    for _, epoch in trainable.phases(rules, PER_EPOCH, 3 * PER_EPOCH):
        optimizer = make_optimizer(config, params, lambda t: LR, epoch=epoch)
        found.append(
            (
                optimizer,
                compiled(make_train_step(Objective(at_epoch(config, Tiny(), rules, epoch), Inputs(None)), optimizer)),
            )
        )
    return found


def steps_of(name: str) -> Iterator[TrainState]:
    """The state at the start and after each update."""
    phases = phases_of(name)
    state = TrainState.create(jax.tree.map(jnp.asarray, tiny.variables()), phases[0][0], with_average=False)
    yield state
    for number in range(len(phases) * PER_EPOCH):
        images, labels = tiny.batch(number, BATCH)
        batch = {"example": np.arange(BATCH, dtype=np.int32), "image": images, "label": labels}
        state, _ = phases[number // PER_EPOCH][1](state, {}, batch)
        yield state


def waiting(state: TrainState, phase: int) -> dict[str, np.ndarray]:
    """By path in the state, all that is of modules that begin after `phase`."""
    groups = state.opt_state[2].inner_states
    parts = {
        "params": {name: state.params[name] for name in MODULES[phase + 1 :]},
        "stats": state.batch_stats if phase == 0 else {},
        "optimizer": {name: groups[name] for name in ("group_1", "group_2")[phase:]},
    }
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(parts)}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_unfreezing_is_torchs(name: str) -> None:
    """Groups added when they begin, a frozen norm in evaluation, and what is frozen without a gradient to clip."""
    model = tiny.in_torch(tiny.variables()).train()
    model.requires_grad_(False)
    model.bn1.eval()
    make = {"sgd": lambda p: torch.optim.SGD(p, LR, 0.9, weight_decay=DECAY),
            "adamw": lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY)}[name]  # fmt: skip
    optimizer = make([*model.fc.requires_grad_(True).parameters()])
    with jax.enable_x64(True):
        states = steps_of(name)
        before = next(states)
        for number, state in enumerate(states):
            phase = number // PER_EPOCH
            if number % PER_EPOCH == 0 and phase:
                begins = getattr(model, MODULES[phase]).requires_grad_(True).train()
                optimizer.add_param_group({"params": [*begins.parameters()]})
            images, labels = tiny.batch(number, BATCH)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(nchw(images)), torch.tensor(labels).long()).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP / 4
            optimizer.step()
            expected = model.state_dict()
            for key, value in tiny.state_dict(state.variables()).items():
                # sums in another order; optax counts Adam's powers of beta in float32
                rtol = 1e-10 if name == "sgd" else 1e-6
                np.testing.assert_allclose(value, expected[key], rtol=rtol, atol=1e-2 * rtol, err_msg=f"{key} {number}")
            still, was = waiting(state, phase), waiting(before, phase)
            assert bool(still) == (phase < 2)
            assert {key: value.tobytes() for key, value in still.items()} == {k: v.tobytes() for k, v in was.items()}
            before = state


# Four updates an epoch.
RUN = (
    "--config.model.weights=one_block",
    "--config.model.freeze=^(?!fc)",
    "--config.optim.l2_sp=0.01",
    "--config.optim.clip_norm=1",
)


@pytest.fixture
def _weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by the name of 'one_block': what the network begins as, without a head."""
    from jaxsft.models.family import init_variables
    from jaxsft.models.initial import make_model
    from jaxsft.models.weights import ModelCard

    def load(name: str, arch: str, checkpoint: str) -> tuple[dict[str, Any], ModelCard]:
        assert name == "one_block"
        variables = init_variables(make_model(small.config(), 3), 11, 32)
        return jax.tree.map(np.asarray, variables), ModelCard(arch, 3, source=name)

    monkeypatch.setattr(prepare_module, "load_pretrained", load)
    monkeypatch.setattr(pretrained, "load_pretrained", load)


@pytest.mark.usefixtures("_weights")
def test_a_run_killed_in_any_phase_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the stem trains from the update after 5 on; resumed at 3, before it, and at 5."""
    options = (*RUN, "--config.model.unfreeze=(('^layer1', 1.25),)", "--config.checkpoint.keep=99",
               "--config.eval.every_epochs=1.25", "--config.train.steps=8")  # fmt: skip
    small.run_here(tmp_path / "whole", *options)
    said = capsys.readouterr().out
    assert said.count("more parameters train from here on") == 1
    assert "epoch 1.25: more parameters train from here on, compiling ..." in said
    for step in (3, 5):
        path = shutil.copytree(tmp_path / "whole", tmp_path / str(step))
        log = path / "metrics.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
        for folder in (path / "checkpoints").iterdir():
            if folder.name.isdecimal() and int(folder.name) > step:
                shutil.rmtree(folder)
        small.run_here(path, *options)
        assert f"resuming at step {step} of 8" in capsys.readouterr().out
        assert small.outcome(path) == small.outcome(tmp_path / "whole")


@pytest.mark.usefixtures("_weights")
def test_calls_end_where_a_phase_does() -> None:
    job, _ = prepare(small.config(*RUN, "--config.model.unfreeze=(('^layer1', 1.25), ('^(conv1|bn1)', 2.5))",
                                  "--config.train.steps_per_call=4", "--config.train.log_every_steps=99",
                                  "--config.checkpoint.every_steps=99", "--config.eval.every_epochs=99"))  # fmt: skip
    assert [phase.after for phase in job.later] == [5, 10]
    calls = list(job.calls(0))
    assert [step for steps in calls for step in steps] == list(range(1, 17))
    assert [(steps[0], steps[-1]) for steps in calls] == [
        (1, 1),
        (2, 5),
        (6, 9),
        (10, 10),
        (11, 14),
        (15, 15),
        (16, 16),
    ]
    used: list[str] = []

    def fake(name: str) -> Any:
        return lambda state, dataset, batches: (used.append(name), (state, {}))[1]

    job.train_step, job.several_steps = fake("0"), fake("0, several")
    job.later = tuple(
        phase._replace(train_step=fake(str(number)), several_steps=fake(f"{number}, several"))
        for number, phase in enumerate(job.later, 1)
    )
    for steps in calls:
        job.update(steps)
    assert used == ["0", "0, several", "1, several", "1", "2, several", "2", "2"]
    flat = traverse_util.flatten_dict(job.state.params, sep="/")
    assert job.rules.keys() == flat.keys()
    assert (job.rules["fc/kernel"].to_start, job.rules["conv1/kernel"].to_start) == (False, True)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            ("--config.model.unfreeze=(('^layer1', 3.9),)", "--config.model.freeze=^layer1"),
            "config.model.unfreeze begins at epoch 3.9; it must be earlier, for the run is 4 epochs long",
        ),
        (
            ("--config.optim.warmup_epochs=3.9",),
            "config.optim.warmup_epochs is 3.9; it must be shorter than the run of 16 updates",
        ),
    ],
)
def test_what_the_length_of_an_epoch_shows_is_refused_before_a_model_is_made(
    options: tuple[str, ...], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "initial", None)
    with pytest.raises(UserError, match=what):
        prepare(small.config(*options))
