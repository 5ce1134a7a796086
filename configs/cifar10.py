"""Fine-tune an ImageNet ResNet on CIFAR-10.

python -m jaxsft.train --config configs/cifar10.py:sample
"""

from ml_collections import ConfigDict

from jaxsft.config import default


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of `variant`: '' | 'reference' | 'resnet50' | 'sample'."""
    config = default()
    config.data.source = "tfds:cifar10"
    config.data.image_size = 224
    config.optim.nesterov = True
    config.optim.lr = 0.01
    config.optim.weight_decay = 5e-4
    config.optim.warmup_epochs = 0.5
    config.train.epochs = 10.0
    if variant == "reference":
        config.data.mean = config.data.std = (0.5, 0.5, 0.5)
        config.data.batch_size = 100
        config.data.augment = ()
        config.optim.update(
            {"lr": 0.001, "nesterov": False, "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0.0}
        )
    elif variant == "resnet50":
        config.model.arch = "resnet50"
        config.model.weights = "IMAGENET1K_V2"
    elif variant == "sample":
        config.model.arch = "resnet10_w16"
        config.model.weights = "sample"
        config.data.source = "sample"
        config.data.image_size = 64
        config.data.batch_size = 100
        config.optim.lr = 0.05
        config.train.epochs = 15.0
    elif variant:
        raise ValueError(f"unknown variant {variant!r}")
    return config
