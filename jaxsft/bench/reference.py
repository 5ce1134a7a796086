"""What PyTorch's users write: a recipe of ours as a plain training loop on torchvision's model, for its accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxsft.cli import UserError
from jaxsft.data.base import Arrays
from jaxsft.data.sources import open_splits
from jaxsft.learn.schedule import make_schedule


def accuracy(config: ConfigDict) -> float:
    """Train as `config` says, in float32, on a GPU of torch's or else the CPU, and return the share that is right.

    Of the eval split. float32 is multiplied as torch does by default: on a GPU, convolutions in TF32.

    Its order, crops and flips are drawn by numpy from the config's seed, its head by torch. Of the config it knows SGD,
    the schedules, weight decay, pad_crop and flip, and train.method 'full' and 'probe'; the latter without
    augmentation, the body in evaluation.

    Args:
      config: of a run on images that are held in memory; its weights are a state_dict of torchvision's, or ''.

    Raises:
      UserError: torch is missing, the weights do not fit, or the images are not held in memory.
    """
    try:
        import torch
    except ImportError:
        raise UserError("torch is not installed", "pip install 'jaxsft[torch]'") from None
    from convert.reference import torchvision_model
    from jaxsft.bench import torch_script as script

    train, evaluated = open_splits(config)
    if not (isinstance(train, Arrays) and isinstance(evaluated, Arrays)):
        raise UserError(f"{config.data.source} is not held in memory", "name images of one size")
    torch.manual_seed(config.seed)
    is_probe, data = config.train.method == "probe", config.data
    model = torchvision_model(config.model.arch, len(train.class_names), data.image_size)
    weights = config.model.weights
    if weights and script.with_weights(model, torch.load(weights, weights_only=True)):
        raise UserError(f"{weights} does not fit a {config.model.arch}", "name a state_dict of torchvision's")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device=device, memory_format=torch.channels_last)
    model.requires_grad_(not is_probe).train(not is_probe).fc.requires_grad_(True)
    batches = script.shuffled(train.images, train.labels, data, () if is_probe else data.augment, config.seed, device)
    script.train(model, batches, rates_of(config, len(train)), settings_of(config))
    return script.accuracy(model, script.in_order(evaluated.images, evaluated.labels, data, device))


def rates_of(config: ConfigDict, count: int) -> list[float]:
    """The learning rate of each update of a run on `count` images, without the last, partial batch of an epoch."""
    per_epoch = count // config.data.batch_size
    total = config.train.steps or max(round(config.train.epochs * per_epoch), 1)
    rates = make_schedule(config, per_epoch, total)(np.arange(total, dtype=np.int32))
    return [float(rate) for rate in np.asarray(rates)]


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """What `torch.optim.SGD` is given of a config."""
    o = config.optim
    return {"lr": o.lr, "momentum": o.momentum, "weight_decay": o.weight_decay, "nesterov": o.nesterov}
