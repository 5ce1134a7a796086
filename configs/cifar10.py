"""CIFAR-10 from a torchvision ResNet: the recipes, each with its command and the result to expect.

    python -m jaxsft.train --config configs/cifar10.py[:VARIANT]

| variant     | what it is                                                                   |
|-------------|------------------------------------------------------------------------------|
| (none)      | ResNet-18, IMAGENET1K_V1, 224 px: LP-FT, Nesterov, cosine, crop, flip        |
| `resnet50`  | the same for ResNet-50, IMAGENET1K_V2                                        |
| `reference` | the plain recipe: 224 px, 0.5/0.5, batch 100, SGD 0.001, 10 epochs, no more  |
| `sample`    | embedded data and weights, no download, no torch: a small ResNet at 64 px    |

Expect, of `(none)` on a small piece of the data, 2,500 images at 64 px, from a ResNet-18 that had seen seven of the
classes at that size: 0.750 test accuracy (0.746 to 0.753 over three seeds), in four minutes on two busy cores:

    --config.model.weights=FILE.pth --config.data.image_size=64 --config.data.train_split='train[45000:]'
    --config.data.per_class=250 --config.eval.every_epochs=10

It is LP-FT, a probe of 20 epochs on features that are computed once, then everything: docs/methods.md has what each
method makes of such images. Expect of `sample` 0.748 test accuracy on the 1,000 embedded test images (0.742 to 0.755
over five seeds), and 0.48 with `--config.model.weights=` (from scratch), in about a minute on two cores. Its rate was
chosen on its 2,000 training images, by cross-validation in five folds (`python -m jaxsft.search --config cifar10:sample
--folds 5`): 0.748 +- 0.019 at 0.01, 0.764 +- 0.021 at 0.02, 0.757 +- 0.020 at 0.03 and 0.751 +- 0.024 at 0.05. LP-FT
makes 0.769 +- 0.025 of it at 0.01 and 0.02, which is not known to be better, so it is plain fine-tuning.
The ImageNet variants have not been measured yet.

Without a network, give the data and the weights by hand:

    --config.data.data_dir=DIR_PREPARED_BY_TFDS --config.model.weights=resnet18-f37072fd.pth
"""

from ml_collections import ConfigDict

from jaxsft.cli import UserError, nearest
from jaxsft.config import default


def finetune() -> ConfigDict:
    """What we would start from: an ImageNet ResNet-18, a probe first and then all layers at one rate (LP-FT)."""
    config = default()
    config.data.source = "tfds:cifar10"
    config.data.image_size = 224  # 32 px would leave the last stage a single pixel
    config.data.batch_size = 128
    config.optim.lr = 0.01
    config.optim.nesterov = True
    config.optim.weight_decay = 5e-4
    config.optim.warmup_epochs = 1.0
    config.train.method = "lp-ft"  # the best of docs/methods.md without images beside the labelled ones
    config.train.epochs = 10.0
    config.train.precision = "auto"
    return config


def resnet50() -> ConfigDict:
    """The deeper network, from the better of its two ImageNet trainings."""
    config = finetune()
    config.model.arch = "resnet50"
    config.model.weights = "IMAGENET1K_V2"
    return config


def reference() -> ConfigDict:
    """What a first PyTorch script does: no augmentation, no schedule, no decay."""
    config = default()
    config.data.source = "tfds:cifar10"
    config.data.image_size = 224
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.data.batch_size = 100
    config.data.augment = ()
    config.optim.lr = 0.001
    config.optim.momentum = 0.9
    config.optim.schedule = "constant"
    config.train.epochs = 10.0
    config.train.precision = "auto"
    return config


def sample() -> ConfigDict:
    """2,000 embedded images, weights that have seen seven of the ten classes; about a minute on two cores."""
    config = finetune()
    config.model.arch = "resnet10_w16"
    config.model.weights = "sample"
    config.data.source = "sample"
    config.data.image_size = 64
    config.data.batch_size = 100
    config.optim.lr = 0.02  # by cross-validation, see above
    config.train.method = "full"
    config.train.epochs = 20.0
    config.train.log_every_steps = 20
    config.eval.every_epochs = 4.0
    return config


VARIANTS = {"": finetune, "resnet50": resnet50, "reference": reference, "sample": sample}


def get_config(variant: str = "") -> ConfigDict:
    """The recipe called `variant`."""
    if variant not in VARIANTS:
        raise UserError(f"configs/cifar10.py has no variant {variant!r}", nearest(variant, [v for v in VARIANTS if v]))
    return VARIANTS[variant]()
