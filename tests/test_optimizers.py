"""The optimizers that torch lacks, or has in other numbers, against the published formulas; and what holds for all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from jaxsft import config as config_module
from jaxsft.learn.optim import make_optimizer

# Two weights, a norm, and the head.
LR, DECAY, BATCHES = 0.05, 0.3, 5
SIZES = {"conv1/kernel": (3, 3, 2, 4), "layer1_0/conv1/kernel": (5, 6), "layer1_0/bn1/scale": (4,),
         "fc/kernel": (4, 3), "fc/bias": (3,)}  # fmt: skip
WEIGHTS = {path for path in SIZES if path.endswith("kernel")}
Arrays = dict[str, np.ndarray]


def nested(values: Arrays) -> dict:
    return traverse_util.unflatten_dict({path: jnp.asarray(value) for path, value in values.items()}, sep="/")


def flat(tree: dict) -> Arrays:
    return {path: np.asarray(value) for path, value in traverse_util.flatten_dict(tree, sep="/").items()}


def drawn() -> tuple[Arrays, list[Arrays]]:
    """Parameters and gradients; one weight starts at 0, and one gradient is 0."""
    rng = np.random.default_rng(3)
    values = {path: rng.normal(0, 1, size) for path, size in SIZES.items()}
    grads = [{path: rng.normal(0, 2, size) for path, size in SIZES.items()} for _ in range(BATCHES)]
    return values, grads


def trained(values: Arrays, grads: list[Arrays], fresh: tuple[str, ...] = (), **settings: object) -> list[Arrays]:
    """Parameters after each update, in float64; the rate of update t is LR / (t + 1)."""
    config = config_module.default()
    config.optim.update({"weight_decay": DECAY, **settings})
    found = []
    with jax.enable_x64(True):
        params = nested(values)
        optimizer = make_optimizer(config, params, lambda t: LR / (t + 1), fresh)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for number, batch in enumerate(grads):
            updates, state = update(nested(batch), state, params, step=jnp.int32(number))
            params = jax.tree.map(jnp.add, params, updates)
            found.append(flat(params))
    return found


def assert_all_close(found: list[Arrays], expected: list[Arrays], rtol: float) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for path, value in one.items():
            np.testing.assert_allclose(value, other[path], rtol=rtol, atol=rtol, err_msg=f"{path} {number}")


def trust(value: np.ndarray, update: np.ndarray, coefficient: float = 1.0) -> float:
    norms = np.linalg.norm(value), np.linalg.norm(update)
    return coefficient * norms[0] / norms[1] if all(norms) else 1.0


def lamb(values: Arrays, grads: list[Arrays], decay: float, betas: tuple[float, float], eps: float) -> list[Arrays]:
    """You et al. 2020, algorithm 2, with phi the identity; norms and biases are AdamW's."""
    first, second, found = dict.fromkeys(values, 0.0), dict.fromkeys(values, 0.0), []
    for t, batch in enumerate(grads):
        new = {}
        for path, g in batch.items():
            first[path] = betas[0] * first[path] + (1 - betas[0]) * g
            second[path] = betas[1] * second[path] + (1 - betas[1]) * g**2
            m, v = first[path] / (1 - betas[0] ** (t + 1)), second[path] / (1 - betas[1] ** (t + 1))
            update = m / (np.sqrt(v) + eps) + decay * values[path]
            share = trust(values[path], update) if path in WEIGHTS else 1.0
            new[path] = values[path] - LR / (t + 1) * share * update
        found.append(values := new)
    return found


def lars(values: Arrays, grads: list[Arrays], coefficient: float, momentum: float) -> list[Arrays]:
    """You et al. 2017, algorithm 1: the rate lies in the momentum; norms and biases are SGD's."""
    buffer, found = dict.fromkeys(values, 0.0), []
    for t, batch in enumerate(grads):
        new = {}
        for path, g in batch.items():
            update = g + DECAY * values[path]
            share = trust(values[path], update, coefficient) if path in WEIGHTS else 1.0
            buffer[path] = momentum * buffer[path] + LR / (t + 1) * share * update
            new[path] = values[path] - buffer[path]
        found.append(values := new)
    return found


def lion(values: Arrays, grads: list[Arrays], betas: tuple[float, float]) -> list[Arrays]:
    """Chen et al. 2023, algorithm 2."""
    moment, found = dict.fromkeys(values, 0.0), []
    for t, batch in enumerate(grads):
        new = {}
        for path, g in batch.items():
            update = np.sign(betas[0] * moment[path] + (1 - betas[0]) * g)
            new[path] = values[path] - LR / (t + 1) * (update + DECAY * values[path])
            moment[path] = betas[1] * moment[path] + (1 - betas[1]) * g
        found.append(values := new)
    return found


# optax counts Adam's powers of beta in float32
PUBLISHED = {
    "lamb": ({"name": "lamb"}, lambda *given: lamb(*given, DECAY, (0.9, 0.999), 1e-6), 1e-6),
    "lamb, told": (
        {"name": "lamb", "betas": (0.8, 0.95), "eps": 1e-2}, lambda *given: lamb(*given, DECAY, (0.8, 0.95), 1e-2), 1e-6
    ),
    "lamb, no decay": (
        {"name": "lamb", "weight_decay": 0.0}, lambda *given: lamb(*given, 0.0, (0.9, 0.999), 1e-6), 1e-6
    ),
    "lars": ({"name": "lars"}, lambda *given: lars(*given, 0.001, 0.9), 1e-12),
    "lars, told": (
        {"name": "lars", "trust_coefficient": 0.02, "momentum": 0.7}, lambda *given: lars(*given, 0.02, 0.7), 1e-12
    ),
    "lion": ({"name": "lion"}, lambda *given: lion(*given, (0.9, 0.99)), 1e-12),
    "lion, told": ({"name": "lion", "betas": (0.5, 0.9)}, lambda *given: lion(*given, (0.5, 0.9)), 1e-12),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_updates_are_the_published_ones(name: str) -> None:
    settings, published, rtol = PUBLISHED[name]
    values, grads = drawn()
    values["conv1/kernel"] *= 0  # a weight without a norm has the plain update
    assert_all_close(trained(values, grads, **settings), published(values, grads), rtol)


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Muon's five iterations, in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def muon(values: Arrays, grads: list[Arrays], momentum: float, nesterov: bool) -> list[Arrays]:
    """What torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does, its iterations in float64; AdamW for the rest."""
    buffer, found = dict.fromkeys(values, 0.0), []
    rest = {path: torch.tensor(value, requires_grad=True) for path, value in values.items()}
    adamw = torch.optim.AdamW(rest.values(), LR, weight_decay=DECAY)
    for t, batch in enumerate(grads):
        new = {}
        for path, tensor in rest.items():
            tensor.grad = torch.tensor(batch[path])
        adamw.param_groups[0]["lr"] = LR / (t + 1)
        adamw.step()
        for path, g in batch.items():
            new[path] = rest[path].detach().numpy().copy()
            if path in WEIGHTS - {"fc/kernel"}:
                buffer[path] = momentum * buffer[path] + (1 - momentum) * g
                update = momentum * buffer[path] + (1 - momentum) * g if nesterov else buffer[path]
                turned = orthogonal(update.reshape(-1, update.shape[-1]))
                turned = turned.reshape(update.shape) * 0.2 * max(turned.shape) ** 0.5
                new[path] = values[path] - LR / (t + 1) * (turned + DECAY * values[path])
        found.append(values := new)
    return found


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_for_weights_and_adamw_for_the_rest(nesterov: bool) -> None:
    values, grads = drawn()
    found = trained(values, grads, name="muon", nesterov=nesterov, momentum=0.95)
    # the powers of Adam's beta are counted in float32, the coefficients of the iterations kept in it
    assert_all_close(found, muon(values, grads, 0.95, nesterov), 1e-5)


@pytest.mark.parametrize("path", ["conv1/kernel", "layer1_0/conv1/kernel"])
def test_muon_is_torchs(path: str) -> None:
    """A convolution's kernel is the matrix that torch's users flatten it to: [outputs, all else]."""
    values, grads = drawn()
    ours = trained(values, grads, name="muon", nesterov=True, momentum=0.95)
    matrix = torch.nn.Parameter(torch.tensor(values[path].reshape(-1, SIZES[path][-1]).T.copy()))
    options = {"weight_decay": DECAY, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = torch.optim.Muon([matrix], LR, **options)
    before = values
    for number, batch in enumerate(grads):
        matrix.grad = torch.tensor(batch[path].reshape(-1, SIZES[path][-1]).T.copy())
        optimizer.param_groups[0]["lr"] = LR / (number + 1)
        start = matrix.detach().numpy().copy()
        optimizer.step()
        step = (matrix.detach().numpy() - start).T.reshape(SIZES[path])
        # torch iterates in bfloat16, eight bits: each of five products of matrices is off by some 2**-8
        found = ours[number][path] - before[path]
        assert np.abs(found - step).max() < 0.05 * np.abs(step).max(), number
        before = ours[number]


# settings, torch's optimizer: its weight decay is the head's alone
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_towards_the_start_is_a_term_of_the_loss(name: str) -> None:
    """L2-SP for sgd as torch adds 0.5 * alpha * |w - w0|**2 to the loss, for adamw decoupled, as its decay is."""
    alpha, fresh = 0.7, ("fc/kernel", "fc/bias")
    values, grads = drawn()
    found = trained(values, grads, fresh, name=name, l2_sp=alpha)
    tensors = {path: torch.tensor(value, requires_grad=True) for path, value in values.items()}
    starts = {path: torch.tensor(value) for path, value in values.items()}
    groups = [{"params": [tensor], "weight_decay": DECAY * (path in fresh)} for path, tensor in tensors.items()]
    optimizer = torch.optim.SGD(groups, LR, 0.9) if name == "sgd" else torch.optim.AdamW(groups, LR)
    expected = []
    for number, batch in enumerate(grads):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = LR / (number + 1)
        loss = sum((tensors[path] * torch.tensor(g)).sum() for path, g in batch.items())
        pulled = [path for path in tensors if path not in fresh]
        if name == "sgd":
            loss = loss + sum(0.5 * alpha * ((tensors[path] - starts[path]) ** 2).sum() for path in pulled)
        loss.backward()
        if name == "adamw":
            with torch.no_grad():
                for path in pulled:
                    tensors[path] -= LR / (number + 1) * alpha * (tensors[path] - starts[path])
        optimizer.step()
        expected.append({path: tensor.detach().numpy().copy() for path, tensor in tensors.items()})
    assert_all_close(found, expected, 1e-12 if name == "sgd" else 1e-6)  # as in test_updates_are_torchs


NAMED = ("sgd", "adamw", "lamb", "lars", "lion", "muon")


@pytest.mark.parametrize("name", NAMED)
def test_rules_hold_for_every_optimizer(name: str) -> None:
    """What is frozen stays; a factor on a rate is one, on the decay, too; the state is the same in every phase."""
    values, grads = drawn()
    config = config_module.default()
    config.optim.update({"name": name, "weight_decay": DECAY, "lr_multipliers": (("^fc", 0.5),), "clip_norm": 1.0})
    config.model.update({"freeze": ("^conv1", "^layer1"), "unfreeze": (("^layer1", 1.0),)})
    with jax.enable_x64(True):
        params, first = nested(values), nested(grads[0])
        phases = [make_optimizer(config, params, lambda t: LR, epoch=epoch) for epoch in (0.0, 1.0)]
        state = phases[0].init(params)
        assert jax.tree.structure(state) == jax.tree.structure(phases[1].init(params))
        updates, after = phases[0].update(first, state, params, step=0)
        for path, update in flat(updates).items():
            assert update.any() == path.startswith("fc"), path
        held = [optimizer_state[2].inner_states["group_1"] for optimizer_state in (state, after)]
        jax.tree.map(np.testing.assert_array_equal, *held)
        later, after = phases[1].update(first, after, params, step=1)
        assert all(update.any() == (path != "conv1/kernel") for path, update in flat(later).items())
        assert jax.tree.structure(after) == jax.tree.structure(state)

        config.optim.lr_multipliers = ()
        plain, _ = (optimizer := make_optimizer(config, params, lambda t: LR)).update(
            first, optimizer.init(params), params, step=0
        )
        np.testing.assert_allclose(flat(updates)["fc/kernel"], 0.5 * flat(plain)["fc/kernel"], rtol=1e-12)


def test_what_is_frozen_or_waits_has_no_part_in_the_norm() -> None:
    values, grads = drawn()
    config = config_module.default()
    config.optim.update({"momentum": 0.0, "clip_norm": 0.1})
    config.model.update({"freeze": ("^conv1", "^layer1"), "unfreeze": (("^layer1", 1.0),)})
    for epoch, trains in ((0.0, ("fc",)), (1.0, ("fc", "layer1"))):
        with jax.enable_x64(True):
            optimizer = make_optimizer(config, params := nested(values), lambda t: 1.0, epoch=epoch)
            updates, _ = optimizer.update(nested(grads[0]), optimizer.init(params), params, step=0)
        norm = np.sqrt(sum((g**2).sum() for path, g in grads[0].items() if path.startswith(trains)))
        expected = -grads[0]["fc/kernel"] * 0.1 / (norm + 1e-6)
        np.testing.assert_allclose(flat(updates)["fc/kernel"], expected, rtol=1e-12)
