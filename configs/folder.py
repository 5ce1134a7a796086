"""Your own images in folders: an ImageNet ResNet-18, a probe first and then everything (LP-FT).

    python -m jaxsft.train --config configs/folder.py[:ARCH] --config.data.source=folder:PATH

PATH holds train/CLASS/*.jpg and val/CLASS/*.jpg; or CLASS/*.jpg, or train/ alone, of which a tenth is kept to evaluate
on. Look at what the model will see with `python -m jaxsft.data.show --config configs/folder.py
--config.data.source=folder:PATH --out grid.png`. Sizes and colours are those that the weights were trained with.

Expect, of 2,500 images of CIFAR-10 as PNG files, from a ResNet-18 that had seen seven of the ten classes at 64 px,
0.745 test accuracy (0.743 to 0.746 over two seeds) on 10,000 others, in five minutes on two busy cores, with
`--config.model.weights=FILE.pth --config.data.preset=config --config.data.image_size=64`. From scratch it takes
`--config.model.weights= --config.train.method=full`. What other methods make of few images: docs/methods.md.
"""

from ml_collections import ConfigDict

from jaxsft.config import default


def get_config(arch: str = "resnet18") -> ConfigDict:
    """The recipe for an architecture of torchvision's."""
    config = default()
    config.model.arch = arch or "resnet18"
    config.data.source = "folder:"
    config.data.preset = "weights"
    config.data.image_size = 224
    config.data.batch_size = 64
    config.data.augment = ("random_resized_crop", "flip")
    config.data.crop_scale = (0.35, 1.0)  # ImageNet's 0.08 is for a hundred epochs
    config.optim.lr = 0.01
    config.optim.nesterov = True
    config.optim.weight_decay = 1e-4
    config.optim.warmup_epochs = 1.0
    config.train.method = "lp-ft"  # a probe, then everything: the best of docs/methods.md for labelled images
    config.train.epochs = 10.0
    config.train.label_smoothing = 0.1
    config.train.precision = "auto"
    return config
