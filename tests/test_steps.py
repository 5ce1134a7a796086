"""What one update computes, against torch in float64: micro-batches, devices, the moving average, mixing, the mask."""

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
from sklearn import metrics as sklearn
from torch.optim.swa_utils import AveragedModel

from jaxsft.data.augment import train_images
from jaxsft.interpret.metrics import Evaluation
from jaxsft.learn import average, objective
from jaxsft.learn.losses import make_loss
from jaxsft.learn.objective import Inputs, Objective
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_several, make_train_step
from jaxsft.models.weights import Preprocessing
from jaxsft.parity.oracle import nchw
from tests import tiny
from tests.tiny import CLASSES, SIDE, Tiny, compiled

LR, MOMENTUM, UPDATES, BATCH = 0.1, 0.9, 4, 16
WEIGHTS = (0.2, 1.0, 3.0, 0.7)
FROZEN = Tiny(frozen=("",))  # every batch norm on its running statistics
DROPS = Tiny(dropout=0.5)
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}  # float64 sums in another order
EMA = average.ema(0.9)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def start(with_average: bool = False) -> tuple[TrainState, optax.GradientTransformation]:
    optimizer = optax.sgd(LR, MOMENTUM)
    values = jax.tree.map(jnp.asarray, tiny.variables())
    return TrainState.create(values, optimizer, with_average), optimizer


def step_of(model: Any, optimizer: optax.GradientTransformation, **options: Any) -> Any:
    """The train step, its loss made of "smoothing" and "class_weights", the rest for it and its objective."""
    of_loss = {name: options[name] for name in ("smoothing", "class_weights", "axis_name") if name in options}
    of_step = {name: options[name] for name in ("accumulate", "axis_name", "average") if name in options}
    rest = {name: value for name, value in options.items() if name not in of_loss | of_step}
    return make_train_step(Objective(model, Inputs(None), make_loss(**of_loss), **rest), optimizer, **of_step)


@functools.cache
def train(model: Any = Tiny(), **options: Any) -> list[tuple[TrainState, dict[str, Any]]]:  # noqa: B008
    """The state and the counts after each update."""
    state, optimizer = start("average" in options)
    step, results = compiled(step_of(model, optimizer, **options)), []
    for number in range(UPDATES):
        state, counts = step(state, {}, tiny.batch_of(number))
        results.append((state, counts))
    return results


def assert_same_as_torch(found: tiny.Variables, model: torch.nn.Module) -> None:
    expected = model.state_dict()
    for name, value in tiny.state_dict(found).items():
        np.testing.assert_allclose(value, expected[name].numpy(), **ROUNDING, err_msg=name)


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **ROUNDING), found, expected)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "class_weights": WEIGHTS}], ids=["plain", "weighted"])
def test_gradient_accumulation_is_torchs(accumulate: int, options: dict[str, Any]) -> None:
    """The loop that torch's users write: each micro-batch's mean loss over their number, one backward pass each."""
    model = tiny.in_torch(tiny.variables()).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    weight = torch.tensor(options["class_weights"], dtype=torch.float64) if options else None
    criterion = torch.nn.CrossEntropyLoss(weight, label_smoothing=options.get("smoothing", 0.0))
    for number, (state, counts) in enumerate(train(accumulate=accumulate, **options)):
        images, labels = tiny.batch(number, BATCH)
        optimizer.zero_grad()
        total, right = 0.0, 0
        for rows in np.split(np.arange(BATCH), accumulate):
            logits = model(nchw(images[rows]))
            loss = criterion(logits, torch.tensor(labels[rows]).long()) / accumulate
            loss.backward()
            total += loss.item()
            right += int((logits.argmax(1).numpy() == labels[rows]).sum())
        optimizer.step()
        assert_same_as_torch(state.variables(), model)
        assert int(state.step) == number + 1
        assert int(counts["count"]) == BATCH
        assert int(counts["top1"]) == right
        assert float(counts["loss"] / counts["count"]) == pytest.approx(total, rel=1e-12)


def test_micro_batches_are_the_batch_where_batch_norm_stands_still() -> None:
    for model in (FROZEN, DROPS.clone(frozen=("",))):
        whole, parts = (train(model, accumulate=n) for n in (1, 8))
        assert_same(parts, whole)
    assert_same(whole[-1][0].batch_stats, tiny.variables()["batch_stats"])


@pytest.mark.parametrize("decay", [0.9, 0.25])
def test_the_moving_average_is_torchvisions(decay: float) -> None:
    """Its ExponentialMovingAverage: the model itself at the first update; batch statistics move with the parameters.

    Counters are the model's. torch averages these too and writes them back as whole numbers.
    """
    trained = tiny.in_torch(tiny.variables())
    theirs = AveragedModel(trained, avg_fn=lambda old, new, _: decay * old + (1 - decay) * new, use_buffers=True)
    for number, (state, _) in enumerate(train(average=average.ema(decay))):
        values = {k: torch.tensor(v) for k, v in tiny.state_dict(state.variables()).items()}
        trained.load_state_dict(values)
        theirs.update_parameters(trained)
        assert int(state.average["batch_stats"]["bn1"]["count"]) == 7 + number + 1
        expected = theirs.module
        expected.load_state_dict({"bn1.num_batches_tracked": values["bn1.num_batches_tracked"]}, strict=False)
        assert_same_as_torch(state.evaluated(), expected)
        if number:
            assert np.abs(state.average["params"]["fc"]["kernel"] - state.params["fc"]["kernel"]).max() > 1e-3


def test_the_average_changes_nothing_but_what_is_evaluated() -> None:
    with_average, without = train(average=EMA), train()
    for (one, counts), (other, expected) in zip(with_average, without, strict=True):
        assert_same((one.variables(), one.opt_state, counts), (other.variables(), other.opt_state, expected))
        assert other.average is None
        assert other.evaluated() == other.variables()


def on_devices(devices: int, model: Any, **options: Any) -> list[tuple[TrainState, dict[str, Any]]]:
    """`train` on so many devices, each of which must come to the same result."""
    state, optimizer = start()
    body = step_of(model, optimizer, axis_name="batch", **options)
    step = compiled(jax.vmap(body, (None, None, 0), axis_name="batch"))
    results = []
    for number in range(UPDATES):
        parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tiny.batch_of(number))
        everywhere = step(state, {}, parts)
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), everywhere)
        state, counts = jax.tree.map(lambda x: x[0], everywhere)
        results.append((state, counts))
    return results


# what batch norm does, how it is on devices, options of the step: all of which are the whole batch on one device
AS_ONE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "frozen": (FROZEN, FROZEN, {}),
    "sync": (Tiny(), Tiny(axis_name="batch"), {}),
    "class weights": (Tiny(), Tiny(axis_name="batch"), {"class_weights": WEIGHTS, "smoothing": 0.2}),
    "dropout": (DROPS, DROPS.clone(axis_name="batch"), {}),
}


@pytest.mark.parametrize("case", AS_ONE)
def test_devices_are_the_whole_batch(case: str) -> None:
    model, divided, options = AS_ONE[case]
    assert_same(on_devices(4, divided, **options), train(model, **options))


def test_statistics_of_their_own_are_averaged() -> None:
    """Four devices under "local" batch norm: gradients of each by itself, and the mean of the running values."""
    (state, counts) = on_devices(4, Tiny())[0]
    images, labels = tiny.batch(0, BATCH)
    gradients, buffers, losses = [], [], []
    for rows in np.split(np.arange(BATCH), 4):
        model = tiny.in_torch(tiny.variables()).train()
        loss = torch.nn.CrossEntropyLoss()(model(nchw(images[rows])), torch.tensor(labels[rows]).long())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        buffers.append(dict(model.named_buffers()))
        losses.append(loss.item())
    expected = {k: torch.tensor(v) for k, v in tiny.state_dict(tiny.variables()).items()}
    for name in expected:
        if name in gradients[0]:
            expected[name] -= LR * torch.stack([g[name] for g in gradients]).mean(0)
        else:
            expected[name] = torch.stack([b[name] for b in buffers]).double().mean(0)
    for name, value in tiny.state_dict(state.variables()).items():
        np.testing.assert_allclose(value, expected[name].numpy(), **ROUNDING, err_msg=name)
    assert float(counts["loss"] / counts["count"]) == pytest.approx(np.mean(losses), rel=1e-12)


def test_several_updates_a_call_are_bit_equal() -> None:
    state, optimizer = start(with_average=True)
    body = step_of(Tiny(), optimizer, average=EMA)
    several, found = compiled(make_several(body))(state, {}, [tiny.batch_of(n) for n in range(UPDATES)])
    one_by_one = train(average=EMA)
    jax.tree.map(np.testing.assert_array_equal, several, one_by_one[-1][0])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[counts for _, counts in one_by_one])
    jax.tree.map(np.testing.assert_array_equal, found, stacked)


def fixed_mix(key: Any, images: Any, partners: Any, mixup: float, cutmix: float) -> tuple[jax.Array, float]:
    """In the place of `mix`, which has tests of its own: no drawing, and a share that shows both alphas."""
    share = mixup / (mixup + cutmix)
    return share * images + (1 - share) * partners, share


@pytest.mark.parametrize("options", [{"smoothing": 0.2}, {"class_weights": WEIGHTS}], ids=["soft", "weighted"])
def test_the_loss_of_mixed_images_is_torchs(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of soft labels; with class weights that of both labels in the shares, each a weighted mean."""
    monkeypatch.setattr(objective, "mix", fixed_mix)
    partner, (images, labels) = np.roll(np.arange(BATCH), 1), tiny.batch(0, BATCH)
    more = {"partner": partner, "partner_image": images[partner], "partner_label": labels[partner]}
    state, optimizer = start()
    step = compiled(step_of(Tiny(), optimizer, mixup=0.3, cutmix=0.7, **options))
    state, counts = step(state, {}, tiny.batch_of(0, **more))

    model = tiny.in_torch(tiny.variables()).train()
    logits = model(nchw(0.3 * images + 0.7 * images[partner]))
    own, other = torch.tensor(labels).long(), torch.tensor(labels[partner]).long()
    weight = torch.tensor(WEIGHTS, dtype=torch.float64) if "class_weights" in options else None
    criterion = torch.nn.CrossEntropyLoss(weight, label_smoothing=options.get("smoothing", 0.0))
    if weight is None:
        one_hot = torch.nn.functional.one_hot
        loss = criterion(logits, 0.3 * one_hot(own, CLASSES).double() + 0.7 * one_hot(other, CLASSES).double())
    else:
        loss = 0.3 * criterion(logits, own) + 0.7 * criterion(logits, other)
    loss.backward()
    torch.optim.SGD(model.parameters(), LR).step()
    assert float(counts["loss"] / counts["count"]) == pytest.approx(loss.item(), rel=1e-12)
    assert_same_as_torch(state.variables(), model)
    assert int(counts["top1"]) == int((logits.argmax(1) == own).sum())


PICTURES = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
TO = Preprocessing(SIDE, SIDE)


NAMES = ("pad_crop", "flip")


def test_pictures_are_drawn_by_seed_step_and_example() -> None:
    """From a set that lies on the device in another order than the batch."""
    labels, example = tiny.batch(0, BATCH)[1], np.arange(BATCH, dtype=np.int32)[::-1].copy()

    def update(seed: jax.Array, number: jax.Array, accumulate: int = 1) -> tuple[jax.Array, jax.Array]:
        state, optimizer = start()
        drawn = Objective(FROZEN, Inputs(TO, NAMES))
        step = make_train_step(drawn, optimizer, seed=seed, accumulate=accumulate)
        dataset = {"images": jnp.asarray(PICTURES), "labels": jnp.asarray(labels)}
        state, counts = step(state.replace(step=number), dataset, {"example": jnp.asarray(example)})
        return state.params["conv1"]["kernel"], counts["loss"]

    inputs = compiled(lambda key: train_images(PICTURES[example], NAMES, TO, key, example))
    step, losses = compiled(update), set()
    for seed, number in ((2, 5), (2, 6), (3, 6)):
        kernel, loss = step(seed, jnp.int32(number))
        images = np.array(inputs(jax.random.fold_in(jax.random.key(seed), number)), np.float64)
        logits = tiny.in_torch(tiny.variables()).eval()(nchw(images))
        expected = torch.nn.CrossEntropyLoss(reduction="sum")(logits, torch.tensor(labels[example]).long())
        assert float(loss) == pytest.approx(expected.item(), rel=1e-6)  # pictures are float32
        losses.add(round(float(loss), 3))
    assert len(losses) == 3
    parts = compiled(functools.partial(update, accumulate=4))(seed, jnp.int32(number))
    np.testing.assert_allclose(parts[0], kernel, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("devices", [None, 4])
def test_evaluation_counts_what_is_not_masked(devices: int | None) -> None:
    """On running statistics, with the plain loss, also where a device has nothing but padding."""
    images, labels = tiny.batch(0, BATCH)
    mask = np.arange(BATCH) < 11
    batch = {**tiny.batch_of(0), "mask": mask}
    values = jax.tree.map(jnp.asarray, tiny.variables())
    body = make_eval_step(Tiny(), None)
    if devices is None:
        answers = compiled(body)(values, {}, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        answers = compiled(jax.vmap(body, (None, None, 0)))(values, {}, parts)
        answers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), answers)
    logits = tiny.in_torch(tiny.variables()).eval()(nchw(images[:11])).detach()
    found = Evaluation.of([jax.device_get(answers)], CLASSES)
    expected = torch.nn.CrossEntropyLoss()(logits, torch.tensor(labels[:11]).long())
    predicted = logits.argmax(1).numpy()
    assert found.count == 11
    assert found.loss == pytest.approx(expected.item(), rel=1e-12)
    assert found.accuracy == sklearn.accuracy_score(labels[:11], predicted)
    np.testing.assert_array_equal(
        found.confusion, sklearn.confusion_matrix(labels[:11], predicted, labels=np.arange(CLASSES))
    )
