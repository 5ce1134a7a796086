"""Make the embedded sample: 3,000 CIFAR-10 images and a small ResNet pretrained on other images of seven classes.

    python -m convert.make_sample RELEASE_FOLDER [--out jaxsft/data/sample]

RELEASE_FOLDER is the unpacked binary release of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html): it holds
data_batch_1.bin .. data_batch_5.bin and test_batch.bin. Written to --out:

    train.png  test.png           2,000 (200 a class) and 1,000 (100 a class) images; `read_sheet` is the layout
    labels.json                   class names, labels, and the images' indices in CIFAR-10
    resnet10_w16.safetensors      torchvision's key layout, 7 classes, 310,359 parameters

The weights have seen no image of the sample, and nothing at all of horse, ship and truck: fine-tuning on the sample
has three classes to learn from nothing.

Expect: 0.851 on the 7,000 CIFAR-10 test images of the seven classes, in 5 min 45 s (24 epochs, 13.4 s each) on two idle
Xeon cores with torch 2.14.
The pixels and labels come out the same everywhere, the weights bit for bit only on the same machine and torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from jaxsft.cli import UserError, local_path, run, say

if TYPE_CHECKING:
    import torch

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN_FILES = [f"data_batch_{n}.bin" for n in range(1, 6)]
TEST_FILES = ["test_batch.bin"]
TRAIN_PER_CLASS, TEST_PER_CLASS = 200, 100
TILE, COLUMNS = 32, 50
RECORD = 1 + 3 * TILE * TILE  # a label, then the red, green and blue planes
PRETRAIN_CLASSES = 7  # airplane .. frog
IMAGE_SIZE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as for every torchvision weight


def check(release: Path, out: Path, epochs: int) -> None:
    """Make `out`; raise a UserError now for what would stop the work minutes in."""
    for path in (release / name for name in TRAIN_FILES + TEST_FILES):
        if not path.is_file() or path.stat().st_size != 10_000 * RECORD:
            raise UserError(f"{path} is missing or cut short", "name the unpacked folder of cifar-10-binary.tar.gz")
    for module in ("torch", "torchvision", "safetensors"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed", "pip install 'jaxsft[torch]'")
    if epochs < 1:
        raise UserError(f"{epochs} epochs train nothing", "give --epochs 1 or more")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} can't be made: {error.strerror}", "give another --out") from None


def read_release(folder: Path, files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The release's images, uint8 [N, 32, 32, 3], and labels, int64 [N], in the order of the files."""
    records = np.concatenate([np.fromfile(folder / name, np.uint8).reshape(-1, RECORD) for name in files])
    images = records[:, 1:].reshape(-1, 3, TILE, TILE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def choose(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices, int64 [per_class * classes], of equally many images of each class, in random order."""
    picks = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in np.unique(labels)]
    return rng.permutation(np.concatenate(picks))


def write_sheet(path: Path, images: np.ndarray) -> None:
    """Write uint8 [N, 32, 32, 3] as one PNG, 50 tiles a row, read like text; N is a multiple of 50."""
    rows = images.reshape(-1, COLUMNS, TILE, TILE, 3).swapaxes(1, 2).reshape(-1, COLUMNS * TILE, 3)
    Image.fromarray(rows).save(path, optimize=True)


def read_sheet(path: Path) -> np.ndarray:
    """The images of a sheet, uint8 [N, 32, 32, 3]: the inverse of `write_sheet`, for any number of columns."""
    sheet = np.asarray(Image.open(path))
    height, width, _ = sheet.shape
    return sheet.reshape(height // TILE, TILE, width // TILE, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)


def resnet10_w16(num_classes: int) -> torch.nn.Module:
    """torchvision's ResNet with one BasicBlock a stage and a quarter of the widths: 16, 32, 64, 128."""
    from torch import nn
    from torchvision.models.resnet import BasicBlock, ResNet

    class NarrowResNet(ResNet):
        """`_make_layer` is asked for torchvision's planes (64 .. 512) and given a quarter of them."""

        inplanes: int

        def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
            if self.inplanes == 64 and stride == 1:  # the first stage: the stem was just built 64 wide
                self.inplanes = 16
                self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
            return super()._make_layer(block, planes // 4, blocks, stride, dilate)

    model = NarrowResNet(BasicBlock, [1, 1, 1, 1])
    model.fc = nn.Linear(128, num_classes)
    return model


def prepare(images: torch.Tensor, augment: bool = False) -> torch.Tensor:
    """uint8 [B, 3, 32, 32] -> float32 [B, 3, 64, 64], normalised; `augment` adds a crop of pad 4 and a flip."""
    import torch
    from torch.nn.functional import interpolate, pad

    x = interpolate(images.float() / 255, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    if augment:
        count, span = len(x), torch.arange(IMAGE_SIZE)
        top, left = torch.randint(0, 9, (2, count, 1))
        left = left + torch.where(torch.rand(count, 1) < 0.5, span, span.flip(0))  # [B, 64]: flipped or not
        rows, columns = (top + span)[:, None, :, None], left[:, None, None, :]
        examples, channels = torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None]
        x = pad(x, (4, 4, 4, 4))[examples, channels, rows, columns]
    return x.contiguous(memory_format=torch.channels_last)  # on a CPU a third faster than NCHW


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of uint8 [N, 3, 32, 32] that the model, in eval mode, gives its label."""
    import torch

    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(prepare(x)).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return hits / len(labels)


def pretrain(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> torch.nn.Module:
    """Train `resnet10_w16` on uint8 [N, 32, 32, 3] with labels int64 [N]: SGD, Nesterov, one cycle."""
    import torch

    torch.manual_seed(seed)
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
    model = resnet10_w16(PRETRAIN_CLASSES).to(memory_format=torch.channels_last)
    batch, steps = 128, len(x) // 128
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    cycle = one_cycle(optimizer, 0.2, total_steps=steps * epochs, pct_start=0.2, cycle_momentum=False)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(x))[: steps * batch].split(batch):
            loss = loss_of(model(prepare(x[rows], augment=True)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.item()
        say(f"epoch {epoch + 1}/{epochs}  loss {total / steps:.4f}")
    return model


def make_images(release: Path, out: Path, rng: np.random.Generator) -> np.ndarray:
    """Write the sheets and labels.json; return the training images chosen, int64 [2000]."""
    chosen = {}
    labels: dict[str, list] = {"class_names": CLASS_NAMES}
    for split, files, per_class in (("train", TRAIN_FILES, TRAIN_PER_CLASS), ("test", TEST_FILES, TEST_PER_CLASS)):
        images, classes = read_release(release, files)
        chosen[split] = index = choose(classes, per_class, rng)
        write_sheet(out / f"{split}.png", images[index])
        labels |= {split: classes[index].tolist(), f"{split}_index": index.tolist()}
    lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in labels.items())
    (out / "labels.json").write_text("{" + lines + "}\n")
    return chosen["train"]


def make_weights(release: Path, out: Path, sample: np.ndarray, epochs: int, seed: int) -> float:
    """Pretrain on the first seven classes without the images in `sample`; save; return the test accuracy."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(2)
    images, labels = read_release(release, TRAIN_FILES)
    keep = labels < PRETRAIN_CLASSES
    keep[sample] = False
    model = pretrain(images[keep], labels[keep], epochs, seed)
    images, labels = read_release(release, TEST_FILES)
    keep = labels < PRETRAIN_CLASSES
    top1 = accuracy(model, torch.from_numpy(images[keep]).permute(0, 3, 1, 2), torch.from_numpy(labels[keep]))
    metadata = {
        "arch": "resnet10_w16",
        "classes": ",".join(CLASS_NAMES[:PRETRAIN_CLASSES]),
        "image_size": str(IMAGE_SIZE),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "trained_on": f"CIFAR-10 train, classes 0..6, without the sample's 2,000 images; {epochs} epochs, seed {seed}",
        "accuracy": f"{top1:.4f} on the {keep.sum():,} CIFAR-10 test images of these classes",
        "made_by": "python -m convert.make_sample",
    }
    path = out / "resnet10_w16.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path, metadata)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    return top1


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=local_path, metavar="RELEASE_FOLDER", help="the folder with data_batch_1.bin")
    parser.add_argument("--out", type=local_path, default=Path("jaxsft/data/sample"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=24, help="of pretraining (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    check(args.release, args.out, args.epochs)
    sample = make_images(args.release, args.out, np.random.default_rng(args.seed))
    top1 = make_weights(args.release, args.out, sample, args.epochs, args.seed)
    say(f"accuracy on the test images of the {PRETRAIN_CLASSES} pretraining classes: {top1:.4f}")
    for path in sorted(args.out.glob("*.*")):
        say(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
