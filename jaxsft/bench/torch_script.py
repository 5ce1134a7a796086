"""What PyTorch's users write: fine-tuning as a plain script of torch, torchvision and numpy, nothing of ours imported.

python torch_script.py RECIPE.json

It prints a line of JSON at the end of each stage, {"stage", "time"}, and "accuracy" with the last. `bench job` writes
the recipe and times the script; `bench methods` takes its functions for the accuracy alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

PAD = 4  # px
CHUNK = 500  # images at a time in evaluation
Batch = tuple[torch.Tensor, torch.Tensor]  # the model's input and its labels


def with_weights(model: torch.nn.Module, state: dict[str, Any]) -> list[str]:
    """Load all of a torchvision ResNet's state_dict but its head; the names that do not fit."""
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    missing, unused = model.load_state_dict(body, strict=False)
    return [*unused, *(name for name in missing if not name.startswith("fc."))]


def train(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    rates: Iterable[float],
    settings: dict[str, Any],
    smoothing: float = 0.0,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """SGD over as many batches as there are `rates`; what requires a gradient is trained, by `settings` of SGD.

    After each update `after` is called with its number, from 0.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, **settings)
    for step, (rate, (images, labels)) in enumerate(zip(rates, batches, strict=False)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels, label_smoothing=smoothing).backward()
        optimizer.step()
        after(step)


def accuracy(model: torch.nn.Module, batches: Iterable[Batch]) -> float:
    """The share that is right."""
    model.eval()
    right = seen = 0
    with torch.no_grad():
        for images, labels in batches:
            right += int((model(images).argmax(1) == labels).sum())
            seen += len(labels)
    return right / seen


def augmented(images: np.ndarray, names: Iterable[str], random: np.random.Generator) -> np.ndarray:
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


def inputs(images: np.ndarray, data: Any, device: str) -> torch.Tensor:
    """uint8 [N, H, W, 3] as torch's [N, 3, S, S] on `device`, resized with antialiasing, normalised as `data` says."""
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device).float() / 255
    x = functional.interpolate(x, (data.image_size, data.image_size), mode=data.interpolation, antialias=True)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (data.mean, data.std))
    return ((x - mean) / std).to(memory_format=torch.channels_last)


def shuffled(
    images: np.ndarray, labels: np.ndarray, data: Any, augment: Iterable[str], seed: int, device: str
) -> Iterator[Batch]:
    """Whole batches of arrays without end, in an order and with changes drawn by numpy from the seed."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(images))
        for at in range(0, len(images) - data.batch_size + 1, data.batch_size):
            rows = order[at : at + data.batch_size]
            pictures = augmented(images[rows], augment, random)
            yield inputs(pictures, data, device), torch.from_numpy(labels[rows]).long().to(device)


def in_order(images: np.ndarray, labels: np.ndarray, data: Any, device: str) -> Iterator[Batch]:
    """All of the arrays, once."""
    for at in range(0, len(images), CHUNK):
        rows = slice(at, at + CHUNK)
        yield inputs(images[rows], data, device), torch.from_numpy(labels[rows]).long().to(device)


def of_folders(data: Any) -> tuple[Iterator[Batch], Iterable[Batch], int]:
    """Batches of FOLDER/train without end, those of FOLDER/val, and the number of classes; decoded by processes."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    size = data.image_size
    crops = {
        "train": [
            transforms.RandomResizedCrop(size, tuple(data.crop_scale), tuple(data.crop_ratio)),
            transforms.RandomHorizontalFlip(),
        ],
        "val": [transforms.Resize(size), transforms.CenterCrop(size)],
    }

    def loader(split: str) -> DataLoader:
        convert = [*crops[split], transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        folder = datasets.ImageFolder(f"{data.folder}/{split}", transforms.Compose(convert))
        for_training = {"shuffle": True, "drop_last": True, "persistent_workers": True} if split == "train" else {}
        return DataLoader(folder, data.batch_size, num_workers=data.workers, **for_training)

    def without_end(batches: DataLoader) -> Iterator[Batch]:
        while True:
            for images, labels in batches:
                yield images.contiguous(memory_format=torch.channels_last), labels

    train = loader("train")
    return without_end(train), loader("val"), len(train.dataset.classes)


def main() -> None:
    from torchvision.models import get_model

    with open(sys.argv[1], encoding="utf-8") as file:
        recipe = json.load(file)
    data = SimpleNamespace(**recipe["data"])
    torch.manual_seed(recipe["seed"])
    if data.folder:
        batches, evaluated, classes = of_folders(data)
    else:
        arrays = np.load(data.arrays)
        batches = shuffled(arrays["images"], arrays["labels"], data, data.augment, recipe["seed"], "cpu")
        evaluated = in_order(arrays["eval_images"], arrays["eval_labels"], data, "cpu")
        classes = int(arrays["labels"].max()) + 1
    model = get_model(recipe["arch"], num_classes=classes)
    if recipe["weights"] and (wrong := with_weights(model, torch.load(recipe["weights"], weights_only=True))):
        sys.exit(f"{recipe['weights']} does not fit: {wrong}")
    model = model.to(memory_format=torch.channels_last).train()
    tell("start-up")
    after = lambda step: None if step else tell("first step")
    train(model, batches, recipe["rates"], recipe["settings"], recipe["smoothing"], after)
    tell("epochs")
    found = accuracy(model, evaluated)
    tell("evaluation")
    torch.save(model.state_dict(), recipe["out"])
    tell("saved", accuracy=found)


def tell(stage: str, **more: Any) -> None:
    """Say that a stage is over."""
    print(json.dumps({"stage": stage, "time": time.time(), **more}), flush=True)


if __name__ == "__main__":
    main()
