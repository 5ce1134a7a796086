"""One process with eight devices: the training step on 1, 2, 4 and 8 of them against the whole batch on one, and
against torch's DistributedDataParallel done by hand. Prints one JSON object: case -> largest relative difference.

python -m tests.parallel_case BACKENDS COUNTS, such as `pmap,shard_map 1,2,4,8`, under
XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from convert import names
from jaxsft import config as config_module
from jaxsft.learn.features import make_features_step
from jaxsft.learn.losses import make_loss
from jaxsft.learn.objective import Inputs, Objective
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import make_schedule
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_train_step
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.head import head_of
from jaxsft.models.resnet import ResNet
from jaxsft.parity import networks, oracle, ours
from jaxsft.parity.compare import Options, class_weights, inputs
from jaxsft.parity.table import compared
from jaxsft.run.parallel import DataParallel
from tests import small, tiny

ARCH, CLASSES, STEPS = small.ARCH, 10, 2
networks.NOT_IN_TORCHVISION[ARCH] = small.in_torch
OPTIONS = Options(ARCH, "float64", batch_size=16, image_size=(32, 32))
LR, MOMENTUM, DECAY, SMOOTHING = 0.05, 0.9, 1e-3, 0.1
WEIGHTS = class_weights(CLASSES)


def model_on(parallel: DataParallel, sync: bool) -> ResNet:
    axis_name = parallel.axis_name if sync else None
    return ARCHITECTURES[ARCH](num_classes=CLASSES, dtype=jnp.float64, param_dtype=jnp.float64, axis_name=axis_name)


def train(parallel: DataParallel, tensors: oracle.Arrays, sync: bool, weights: tuple[float, ...]) -> dict[str, Any]:
    """The state after STEPS updates, and the loss of each, by torch's names."""
    model = model_on(parallel, sync)
    values = ours.variables(model, tensors, ARCH)
    config = config_module.default()
    config.optim.update({"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "schedule": "constant"})
    optimizer = make_optimizer(config, values["params"], make_schedule(config, 1, STEPS))
    objective = Objective(model, Inputs(None), make_loss(SMOOTHING, weights, parallel.axis_name))
    body = make_train_step(objective, optimizer, axis_name=parallel.axis_name)
    step = parallel.compile(body)
    state = parallel.replicate(TrainState.create(values, optimizer))
    result = {}
    for number in range(STEPS):
        batch = inputs(OPTIONS, CLASSES, number)
        dataset = parallel.replicate({"images": batch.images, "labels": batch.labels})
        example = np.arange(OPTIONS.batch_size, dtype=np.int32)
        state, counts = step(state, dataset, parallel.split({"example": example}))
        result[f"loss {number}"] = np.asarray(counts["loss"] / counts["count"])
    momentum = names.to_torch({"params": jax.device_get(optax.tree.get(state.opt_state, "trace"))}, ARCH)
    return {
        **result,
        **names.to_torch(jax.device_get(state.variables()), ARCH),
        **{f"momentum {name}": value for name, value in momentum.items()},
    }


def dropping(parallel: DataParallel) -> dict[str, Any]:
    """The parameters of a small network that drops values and images, after STEPS updates."""
    optimizer = optax.sgd(LR, MOMENTUM)
    model = tiny.Tiny(dropout=0.5, axis_name=parallel.axis_name)
    step = parallel.compile(make_train_step(Objective(model, Inputs(None)), optimizer, axis_name=parallel.axis_name))
    state = parallel.replicate(TrainState.create(tiny.variables(), optimizer))
    for number in range(STEPS):
        images, labels = tiny.batch(number)
        example = np.arange(len(labels), dtype=np.int32)
        state, _ = step(state, {}, parallel.split({"example": example, "image": images, "label": labels}))
    return tiny.state_dict(jax.device_get(state.variables()))


def probing(parallel: DataParallel) -> dict[str, Any]:
    """The parameters after STEPS updates of the head alone, on features that all devices have made of their shares."""
    optimizer, values = optax.sgd(LR, MOMENTUM), tiny.variables()
    model = tiny.Tiny(dropout=0.5, frozen=("",), axis_name=parallel.axis_name)
    make = parallel.compile(make_features_step(model, "fc", None), rows=True)
    head = head_of(model, "fc", values, tiny.SIDE)
    step = parallel.compile(make_train_step(Objective(head, Inputs(None)), optimizer, axis_name=parallel.axis_name))
    state = parallel.replicate(TrainState.create(values, optimizer, with_average=False))
    for number in range(STEPS):
        images, labels = tiny.batch(number)
        batch = {"example": np.arange(len(labels), dtype=np.int32), "label": labels}
        sent = parallel.split({**batch, "image": images, "mask": np.ones(len(labels), bool)})
        features = parallel.join(make(parallel.replicate(values), {}, sent))["features"]
        state, _ = step(state, {}, parallel.split({**batch, "image": features}))
    return tiny.state_dict(jax.device_get(state.variables()))


def ddp(tensors: oracle.Arrays, replicas: int) -> tuple[dict[str, Any], list[oracle.Arrays]]:
    """torch's DistributedDataParallel by hand: gradients of equal shares averaged, each replica its own statistics.

    Returns what `train` does without running statistics, and every replica's buffers at the end. DDP hands rank 0's
    buffers to all before each forward pass; within one step the replicas' differ.
    """
    model = networks.build(ARCH, CLASSES).double()
    oracle.load(model, tensors)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    parameters = list(model.parameters())
    names_ = [name for name, _ in model.named_parameters()]
    result, buffers = {}, []
    for number in range(STEPS):
        batch = inputs(OPTIONS, CLASSES, number)
        before = {name: value.clone() for name, value in model.named_buffers()}
        gradients, losses, buffers = [], [], []
        for rows in np.split(np.arange(OPTIONS.batch_size), replicas):
            model.load_state_dict(before, strict=False)
            logits, _ = oracle.activations(model, batch.images[rows], train=True)
            loss = oracle.loss(logits, batch.labels[rows], SMOOTHING, ())
            gradients.append(torch.autograd.grad(loss, parameters))
            losses.append(loss.item())
            buffers.append({name: value.numpy().copy() for name, value in model.named_buffers()})
        for parameter, *shares in zip(parameters, *gradients, strict=True):
            parameter.grad = torch.stack(shares).mean(0)
        optimizer.step()
        # What ours keeps: the mean of the replicas' running statistics.
        mean = {name: torch.as_tensor(np.mean([b[name] for b in buffers], axis=0)) for name in before}
        model.load_state_dict({name: value.to(before[name].dtype) for name, value in mean.items()}, strict=False)
        result[f"loss {number}"] = np.array(np.mean(losses))
    result |= {name: p.detach().numpy().copy() for name, p in zip(names_, parameters, strict=True)}
    for name, parameter in zip(names_, parameters, strict=True):
        result[f"momentum {name}"] = optimizer.state[parameter]["momentum_buffer"].numpy()
    return result, buffers


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative difference of any tensor that is expected."""
    rows = [compared(name, found[name], value, 0.0) for name, value in expected.items()]
    return max(float("inf") if row.relative is None else row.relative for row in rows)


def main() -> None:
    backends, counts = sys.argv[1].split(","), [int(count) for count in sys.argv[2].split(",")]
    result = {}
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        tensors = oracle.state(networks.build(ARCH, CLASSES).double())
        whole = train(DataParallel("pmap", jax.devices()[:1]), tensors, False, WEIGHTS)
        dropped = dropping(DataParallel("pmap", jax.devices()[:1]))
        probed = probing(DataParallel("pmap", jax.devices()[:1]))
        for backend in backends:
            for count in counts:
                parallel = DataParallel(backend, jax.devices()[:count])
                result[f"drops {backend} {count}"] = worst(dropping(parallel), dropped)
                result[f"probes {backend} {count}"] = worst(probing(parallel), probed)
                result[f"sync {backend} {count}"] = worst(train(parallel, tensors, True, WEIGHTS), whole)
        for backend in backends:
            count = max(counts)
            expected, buffers = ddp(tensors, count)
            found = train(DataParallel(backend, jax.devices()[:count]), tensors, False, ())
            statistics = [name for name in buffers[0] if "running" in name]
            mean = {name: np.mean([b[name] for b in buffers], axis=0) for name in statistics}
            result[f"local {backend} {count}"] = worst(found, {**expected, **mean})
            result[f"local {backend} {count}, statistics from rank 0's"] = worst(
                found, {name: buffers[0][name] for name in statistics}
            )
            counters = {n: v for n, v in buffers[0].items() if n.endswith("num_batches_tracked")}
            result[f"local {backend} {count}, counters"] = worst(found, counters)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
