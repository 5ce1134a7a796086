"""SAM, averages, distillation, FixMatch, loss scaling: what torch and the papers make of the same, in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional as F  # noqa: N812  (as torch's users write it)
from torch.optim.swa_utils import AveragedModel, update_bn

from jaxsft.learn import average, loss_scale
from jaxsft.learn.distill import Teacher, renormalised
from jaxsft.learn.fixmatch import FixMatch, strong
from jaxsft.learn.objective import Inputs, Objective
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_statistics_step, make_train_step
from jaxsft.models.weights import Preprocessing
from jaxsft.parity.oracle import nchw
from tests import tiny
from tests.tiny import Tiny, compiled

LR, BATCH = 0.1, 16
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}  # float64 sums in another order


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def updated(objective: Objective, batch: dict[str, np.ndarray], dataset: Any = None, **options: Any) -> tuple[Any, Any]:
    """The state and the counts after one update by plain SGD; with `axis_name` on four devices, equal on all."""
    optimizer = optax.sgd(LR)
    state = TrainState.create(jax.tree.map(jnp.asarray, tiny.variables()), optimizer)
    step = make_train_step(objective, optimizer, **options)
    if "axis_name" not in options:
        return compiled(step)(state, dataset or {}, batch)
    parts = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
    everywhere = compiled(jax.vmap(step, (None, None, 0), axis_name="batch"))(state, dataset or {}, parts)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), everywhere)
    return jax.tree.map(lambda x: x[0], everywhere)


def descended(model: torch.nn.Module, loss: torch.Tensor) -> None:
    """One update of torch's."""
    loss.backward()
    torch.optim.SGD(model.parameters(), LR).step()


def assert_same_as_torch(found: Any, model: torch.nn.Module) -> None:
    expected = model.state_dict()
    for name, value in tiny.state_dict(found).items():
        np.testing.assert_allclose(value, expected[name].numpy(), **ROUNDING, err_msg=name)


# Options of the step, which parameters stay: SAM neither moves them nor counts them in the norm.
SAM_CASES: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "all": ({}, Tiny(), ()),
    "micro-batches": ({"accumulate": 4}, Tiny(frozen=("",)), ()),
    "devices": ({"axis_name": "batch"}, Tiny(axis_name="batch"), ()),
    "a part": ({"frozen": ("conv1/kernel", "fc/bias")}, Tiny(), ("conv1.weight", "fc.bias")),
    "a part of micro-batches": ({"frozen": ("bn1/bias",), "accumulate": 4}, Tiny(frozen=("",)), ("bn1.bias",)),
}


@pytest.mark.parametrize("case", SAM_CASES)
def test_the_two_gradients_of_sam_are_the_papers(case: str) -> None:
    """arXiv:2010.01412, algorithm 1: the gradient at w + rho * g / |g|; batch statistics are those of the pass at w."""
    options, network, still = SAM_CASES[case]
    rho = 0.7
    state, counts = updated(Objective(network, Inputs(None)), tiny.batch_of(0), sam=rho, **options)

    model = tiny.in_torch(tiny.variables()).train(network.frozen == ())
    images, labels = tiny.batch(0, BATCH)
    criterion, inputs, targets = torch.nn.CrossEntropyLoss(), nchw(images), torch.tensor(labels).long()
    loss = criterion(model(inputs), targets)
    loss.backward()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    trained = {name: p for name, p in model.named_parameters() if name not in still}
    norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in trained.values():
            p += rho * p.grad / norm
    model.zero_grad()
    criterion(model(inputs), targets).backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name] - LR * p.grad * (name not in still))
        for name, value in model.named_buffers():
            value.copy_(statistics[name])
    if case != "devices":  # there the running variance is by other counts; it has a test of its own
        assert_same_as_torch(state.variables(), model)
    else:
        np.testing.assert_allclose(state.params["fc"]["kernel"].T, model.fc.weight.detach(), **ROUNDING)
    assert float(counts["loss"] / counts["count"]) == pytest.approx(loss.item(), rel=1e-12)


def test_the_decay_of_a_moving_average_warms_up() -> None:
    """TensorFlow's min(decay, (1 + n) / (10 + n)); the first update is the beginning."""
    move, values = compiled(average.ema(0.3, warmup=True)), np.random.default_rng(0).normal(size=7)
    found = expected = jnp.zeros(())
    for n, value in enumerate(values):
        found = move(found, jnp.asarray(value), jnp.int32(n))
        rate = min(0.3, (1 + n) / (10 + n))
        expected = rate * expected + (1 - rate) * value if n else value
        assert float(found) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("total", "every", "epochs"), [(12, 3, 3), (11, 4, 2), (5, 2, 9), (3, 7, 1)])
def test_the_mean_over_epochs_is_torchs(total: int, every: int, epochs: int) -> None:
    """AveragedModel's, updated at the ends of epochs, the last one being the run's own."""
    module = torch.nn.Linear(1, 1, bias=False).double()
    first = average.swa_start(total, every, epochs)
    theirs, move = AveragedModel(module), compiled(average.swa(first, every))
    ends = list(range(total, 0, -every))[:epochs]
    found = {"params": jnp.zeros((1, 1)), "batch_stats": jnp.zeros(())}
    for step in range(1, total + 1):
        value = np.random.default_rng(step).normal(size=(1, 1))
        found = move(found, {"params": jnp.asarray(value), "batch_stats": jnp.asarray(step)}, jnp.int32(step - 1))
        module.weight.data.copy_(torch.tensor(value))
        if step in ends:
            theirs.update_parameters(module)
        expected = theirs.module.weight.detach().numpy() if step >= min(ends) else value
        np.testing.assert_allclose(found["params"], expected, rtol=1e-12)
        assert int(found["batch_stats"]) == step
    assert first == min(ends)


@pytest.mark.parametrize("devices", [None, 1])
def test_batch_statistics_are_estimated_as_torchs_update_bn(devices: int | None) -> None:
    """The mean over the batches, the variances unbiased; frozen norms stay."""
    model, batches = tiny.in_torch(tiny.variables()), [tiny.batch_of(n) for n in range(3)]
    update_bn([nchw(batch["image"]) for batch in batches], model)
    step = make_statistics_step(Tiny(), Inputs(None), axis_name=devices and "batch")
    step = compiled(jax.vmap(step, (None, None, 0), axis_name="batch") if devices else step)
    found = {**jax.tree.map(jnp.asarray, tiny.variables()), "seen": jnp.int32(0)}
    for batch in batches:
        found = step(found, {}, jax.tree.map(lambda x: x[None], batch) if devices else batch)
        found = jax.tree.map(lambda x: x[0], found) if devices else found
    expected = model.state_dict()
    for name, value in tiny.state_dict(found).items():
        if name != "bn1.num_batches_tracked":  # torch counts anew
            np.testing.assert_allclose(value, expected[name].numpy(), **ROUNDING, err_msg=name)
    frozen = compiled(make_statistics_step(Tiny(frozen=("",)), Inputs(None)))
    stays = frozen({**tiny.variables(), "seen": jnp.int32(2)}, {}, batches[0])["batch_stats"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), stays, tiny.variables()["batch_stats"])


def mixed(key: Any, images: Any, partners: Any, mixup: float, cutmix: float) -> tuple[jax.Array, float]:
    """In the place of `mix`, which has tests of its own."""
    return 0.3 * images + 0.7 * partners, 0.3


@pytest.mark.parametrize("mixes", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("independent", [False, True], ids=["softmax", "sigmoid"])
def test_the_gradient_of_distillation_is_torchs(independent: bool, mixes: bool, monkeypatch) -> None:
    """(1 - weight) * cross-entropy + weight * T^2 * KL, the teacher in evaluation, its outputs in another order."""
    monkeypatch.setattr("jaxsft.learn.objective.mix", mixed)
    columns, weight, t = (2, 0, 3, 1), 0.3, 3.0
    teacher = Teacher(Tiny(), Preprocessing(), columns, weight, t, independent)
    images, labels = tiny.batch(0, BATCH)
    partner = np.roll(np.arange(BATCH), 1)
    more = {"partner": partner, "partner_image": images[partner], "partner_label": labels[partner]} if mixes else {}
    objective = Objective(Tiny(), Inputs(None), mixup=float(mixes), teacher=teacher)
    state, counts = updated(objective, tiny.batch_of(0, **more), {"teacher": tiny.variables(1)})

    inputs = nchw(0.3 * images + 0.7 * images[partner] if mixes else images)
    model, master = tiny.in_torch(tiny.variables()).train(), tiny.in_torch(tiny.variables(1)).eval()
    logits, targets = model(inputs), master(inputs).detach()[:, columns]
    own, other = torch.tensor(labels).long(), torch.tensor(labels[partner]).long()
    loss = F.cross_entropy(logits, own)
    if mixes:
        loss = 0.3 * loss + 0.7 * F.cross_entropy(logits, other)
    if independent:
        p, q = (targets / t).sigmoid(), (logits / t).sigmoid()
        taught = F.binary_cross_entropy(q, p) - F.binary_cross_entropy(p, p)
    else:
        taught = F.kl_div((logits / t).log_softmax(1), (targets / t).softmax(1), reduction="batchmean")
    loss = (1 - weight) * loss + weight * t**2 * taught
    descended(model, loss)
    assert float(counts["loss"] / counts["count"]) == pytest.approx(loss.item(), rel=1e-10)
    assert_same_as_torch(state.variables(), model)


def test_a_teacher_sees_the_same_pictures_in_its_own_way() -> None:
    """The student's input, augmented and normalised, by the teacher's mean, deviation and size."""
    there, here = Preprocessing(8, 8), Preprocessing(4, 4, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    pixels = np.random.default_rng(0).uniform(size=(2, 8, 8, 3))
    found = renormalised((pixels - there.mean) / there.std, there, here)
    small = F.interpolate(nchw(pixels), (4, 4), mode="bilinear", antialias=True).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, (small - here.mean) / here.std, rtol=1e-6)  # resized by weights of float32
    assert renormalised(pixels, there, there) is pixels


@pytest.mark.parametrize("options", [{}, {"axis_name": "batch"}, {"accumulate": 2}], ids=["one", "devices", "micro"])
def test_the_gradient_of_fixmatch_is_torchs(options: dict[str, Any], monkeypatch) -> None:
    """arXiv:2001.07685, equation 4: pseudo-labels of the weak view where it is sure; one batch norm for all images."""
    threshold, weight, ratio = 0.4, 2.0, 2
    monkeypatch.setattr(Inputs, "strongly", lambda self: lambda *arguments: -self(*arguments))
    rng = np.random.default_rng(5)
    unlabelled = rng.standard_normal((ratio * BATCH, *tiny.batch(0)[0].shape[1:])) + rng.normal(0, 2, (32, 1, 1, 1))
    batch = tiny.batch_of(0, unlabelled_example=np.arange(len(unlabelled), dtype=np.int32), unlabelled_image=unlabelled)
    frozen = options != {}  # the parts of a batch have statistics of their own, which other tests compare
    network = Tiny(frozen=("",)) if frozen else Tiny()
    state, counts = updated(Objective(network, Inputs(None), fixmatch=FixMatch(threshold, weight)), batch, **options)

    images, labels = tiny.batch(0, BATCH)
    model = tiny.in_torch(tiny.variables()).train(not frozen)
    own, weak, hard = model(nchw(np.concatenate([images, unlabelled, -unlabelled]))).split([16, 32, 32])
    sure, pseudo = weak.detach().softmax(1).max(1)
    mask = (sure >= threshold).double()
    assert 4 < mask.sum() < 28
    loss = F.cross_entropy(own, torch.tensor(labels).long())
    descended(model, loss + weight * (F.cross_entropy(hard, pseudo, reduction="none") * mask).mean())
    assert float(counts["loss"] / counts["count"]) == pytest.approx(loss.item(), rel=1e-10)
    assert (int(counts["confident"]), int(counts["unlabelled"])) == (int(mask.sum()), 32)
    assert_same_as_torch(state.variables(), model)


def test_the_strong_view_is_the_weak_one_and_more() -> None:
    assert strong(("pad_crop", "flip", "random_erasing")) == ("pad_crop", "flip", "rand_augment", "random_erasing")
    assert strong(()) == ("rand_augment", "random_erasing")
    assert Inputs(None, ("flip",)).strongly().amounts.erasing == 1.0


def test_the_scale_of_the_loss_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GradScaler, on a pattern of gradients that are finite or not."""
    assert (65536, torch.amp.GradScaler("cpu").get_growth_interval()) == (loss_scale.FIRST, loss_scale.PERIOD)
    monkeypatch.setattr(loss_scale, "PERIOD", 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale.FIRST, growth_interval=loss_scale.PERIOD)
    parameter, found = torch.zeros(1, requires_grad=True), loss_scale.create()
    optimizer = torch.optim.SGD([parameter], LR)
    adjust, every = jax.jit(loss_scale.adjusted), loss_scale.PERIOD
    for finite in [True, False, False] + [True] * every + [False] + [True] * (every - 1) + [False] + [True]:
        parameter.grad = torch.tensor([0.0 if finite else torch.inf])
        scaler.scale(torch.zeros(1))  # makes its scale, the first time
        scaler.step(optimizer)
        scaler.update()
        found = adjust(found, finite)
        assert float(found["scale"]) == scaler.get_scale()


def test_updates_with_a_scale_are_those_without_and_what_is_not_finite_is_skipped() -> None:
    objective, optimizer = Objective(Tiny(), Inputs(None)), optax.sgd(LR, 0.9)
    values = jax.tree.map(jnp.asarray, tiny.variables())
    step = compiled(make_train_step(objective, optimizer, average=average.ema(0.5)))
    start = TrainState.create(values, optimizer, with_average=True, with_loss_scale=True)
    scaled, counts = step(start, {}, tiny.batch_of(0))
    plain, _ = step(start.replace(loss_scale=None), {}, tiny.batch_of(0))
    assert int(counts["skipped"]) == 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDING), scaled.replace(loss_scale=None), plain)
    poisoned = tiny.batch_of(1)
    poisoned["image"][3, 0, 0, 0] = np.inf
    after, counts = step(scaled, {}, poisoned)
    assert int(counts["skipped"]) == 1
    assert int(after.step) == 2
    assert float(after.loss_scale["scale"]) == loss_scale.FIRST / 2
    kept = after.replace(step=scaled.step, loss_scale=scaled.loss_scale)
    jax.tree.map(np.testing.assert_array_equal, kept, scaled)
