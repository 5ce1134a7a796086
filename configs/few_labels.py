"""CIFAR-10 from few labels: the methods side by side, each with its command; docs/methods.md has the whole table.

    python -m jaxsft.train --config configs/few_labels.py:METHOD --config.data.per_class=25

From a ResNet-18 at 64 px. Labelled are 25 or 250 images of each class out of the last 5,000 training images, 250 or
2,500 in all; every test image is evaluated.

| METHOD           | what it is                                                                             |
|------------------|----------------------------------------------------------------------------------------|
| `scratch`        | no weights                                                                             |
| `probe`          | the head alone, on features that are computed once                                     |
| (none), `full`   | everything, at one rate                                                                |
| `lp-ft`          | the head alone on kept features, then everything                                       |
| `discriminative` | everything, each stage nearer the image at half the rate of the one above it           |
| `ema`            | full, and the moving average of what it learns is kept                                 |
| `mixup`          | full, on mixed images                                                                  |
| `sam`            | full, by sharpness-aware minimisation: two gradients an update                         |
| `fixmatch`       | full, and FixMatch on all 5,000 images, their labels not looked at                     |
| `combined`       | LP-FT and FixMatch, sure at 0.8, and the moving average is kept                        |
"""

from ml_collections import ConfigDict

from jaxsft.cli import UserError, nearest
from jaxsft.config import default

LP_FT = {"train.method": "lp-ft", "optim.lr": 0.003}
UNLABELLED = {"data.unlabelled": "tfds:cifar10", "data.unlabelled_split": "train[45000:]"}
METHODS = {
    "": {},
    "scratch": {"model.weights": ""},
    "probe": {"train.method": "probe", "optim.lr": 0.3},
    "full": {},
    "lp-ft": LP_FT,
    "discriminative": {"optim.layer_decay": 0.5, "optim.lr": 0.02},
    "ema": {"train.ema": 0.95, "train.ema_warmup": True},
    "mixup": {"train.mixup": 0.2},
    "sam": {"optim.sam": 0.05},
    "fixmatch": {**UNLABELLED, "optim.lr": 0.03},
    "combined": {
        **LP_FT, **UNLABELLED, "optim.lr": 0.01, "train.fixmatch_threshold": 0.8,
        "train.ema": 0.99, "train.ema_warmup": True,
    },
}  # fmt: skip


def get_config(method: str = "") -> ConfigDict:
    """The recipe of a method; epochs and batch are those of 250 images."""
    if method not in METHODS:
        raise UserError(f"configs/few_labels.py has no method {method!r}", nearest(method, [m for m in METHODS if m]))
    config = default()
    config.data.source = "tfds:cifar10"
    config.data.train_split = "train[45000:]"
    config.data.eval_split = "test"
    config.data.per_class = 25
    config.data.image_size = 64
    config.data.batch_size = 50
    config.optim.lr = 0.01
    config.optim.nesterov = True
    config.optim.weight_decay = 5e-4
    config.optim.warmup_epochs = 1.0
    config.train.epochs = 20.0
    config.train.log_every_steps = 50
    config.eval.every_epochs = 20.0
    for key, value in METHODS[method].items():
        section, _, name = key.partition(".")
        config[section][name] = value
    return config
