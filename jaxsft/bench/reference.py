"""What PyTorch's users write: a recipe of ours as a plain training loop on torchvision's model, for its accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxsft.cli import UserError
from jaxsft.data.augment import PAD
from jaxsft.data.base import Arrays
from jaxsft.data.sources import open_splits
from jaxsft.learn.schedule import make_schedule

CHUNK = 500  # images at a time in evaluation


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

    train, evaluated = open_splits(config)
    if not (isinstance(train, Arrays) and isinstance(evaluated, Arrays)):
        raise UserError(f"{config.data.source} is not held in memory", "name images of one size")
    torch.manual_seed(config.seed)
    random, is_probe = np.random.default_rng(config.seed), config.train.method == "probe"
    model = torchvision_model(config.model.arch, len(train.class_names), config.data.image_size)
    if weights := config.model.weights:
        state = {k: v for k, v in torch.load(weights, weights_only=True).items() if not k.startswith("fc.")}
        missing, unused = model.load_state_dict(state, strict=False)
        if unused or any(not name.startswith("fc.") for name in missing):
            raise UserError(f"{weights} does not fit a {config.model.arch}", "name a state_dict of torchvision's")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device=device, memory_format=torch.channels_last)
    trained = model.fc.parameters() if is_probe else model.parameters()
    model.requires_grad_(not is_probe).fc.requires_grad_(True)
    o, per_epoch = config.optim, len(train) // config.data.batch_size
    total = config.train.steps or round(config.train.epochs * per_epoch)
    rate = make_schedule(config, per_epoch, total)
    optimizer = torch.optim.SGD(trained, o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov)
    order = np.empty(0, int)
    for step in range(total):
        if step % per_epoch == 0:
            order = random.permutation(len(train))
        rows = order[step % per_epoch * config.data.batch_size :][: config.data.batch_size]
        pictures = train.images[rows] if is_probe else augmented(train.images[rows], tuple(config.data.augment), random)
        model.train(not is_probe)
        optimizer.param_groups[0]["lr"] = float(rate(step))
        optimizer.zero_grad()
        labels = torch.from_numpy(train.labels[rows]).long().to(device)
        torch.nn.functional.cross_entropy(model(inputs(pictures, config, device)), labels).backward()
        optimizer.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for at in range(0, len(evaluated), CHUNK):
            logits = model(inputs(evaluated.images[at : at + CHUNK], config, device))
            right += int((logits.argmax(1).cpu().numpy() == evaluated.labels[at : at + CHUNK]).sum())
    return right / len(evaluated)


def augmented(images: np.ndarray, names: tuple[str, ...], random: np.random.Generator) -> np.ndarray:
    """uint8 [N, H, W, 3] moved by up to PAD px each way and turned over by a coin, each by itself."""
    if "pad_crop" in names:
        height, width = images.shape[1:3]
        padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
        tops, lefts = random.integers(0, 2 * PAD + 1, (2, len(images)))
        images = np.stack([p[t : t + height, x : x + width] for p, t, x in zip(padded, tops, lefts, strict=True)])
    if "flip" in names:
        coins = random.random(len(images)) < 0.5
        images = np.where(coins[:, None, None, None], images[:, :, ::-1], images)
    return images


def inputs(images: np.ndarray, config: ConfigDict, device: str) -> Any:
    """uint8 [N, H, W, 3] as torch's [N, 3, S, S] on `device`, resized with antialiasing, and normalised."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device).float() / 255
    size, mode = config.data.image_size, config.data.interpolation
    x = torch.nn.functional.interpolate(x, (size, size), mode=mode, antialias=True)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (config.data.mean, config.data.std))
    return ((x - mean) / std).to(memory_format=torch.channels_last)
