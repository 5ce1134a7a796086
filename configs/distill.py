"""A smaller network learns from a run of a larger one (distillation): its labels, and what the teacher makes of them.

    python -m jaxsft.train --config configs/cifar10.py
    python -m jaxsft.train --config configs/distill.py[:ARCH] --config.train.teacher=runs/cifar10

The first command trains the teacher, a ResNet-18, in runs/cifar10; any finished run on the same classes will do. The
second trains ARCH on the same images, each augmented, mixed and seen by both networks: half of its loss is that of the
labels, half is how far it is from the teacher's answers, both softened by a temperature of 4.

| ARCH                           | starts from                              | parameters of 10 classes |
|--------------------------------|------------------------------------------|--------------------------|
| (none), `mobilenet_v3_small`   | IMAGENET1K_V1, 224 px                    | 1,528,106                |
| `shufflenet_v2_x0_5` and so on | torchvision's, by the architecture       | 352,042                  |
| `resnet10_w16`                 | the weights that come with jaxsft, 64 px | 310,746                  |

ResNet-18 has 11,181,642. Measured of `resnet10_w16` at 64 px on the first 5,000 training images of CIFAR-10
(`--config.data.train_split=train[:10%]`), one seed: accuracy and loss on the 10,000 test images. The teacher is a
ResNet-18 tuned on the same images (0.777; 0.673); alone is `--config.train.teacher=`.

| starts from                        | taught       | alone        |
|------------------------------------|--------------|--------------|
| its weights, of seven classes      | 0.791; 0.626 | 0.790; 0.667 |
| scratch, `--config.model.weights=` | 0.660; 1.016 | 0.621; 1.074 |

So a teacher gives what its student does not know already, and better probabilities. The other variants have not been
measured. From scratch a MobileNetV3 needs a thousand updates or more: its running statistics move by a hundredth in
each, as torchvision's do, and after 470 they still held what they began with (0.13 on CIFAR-10's test images).
"""

from ml_collections import ConfigDict

from jaxsft.config import default


def get_config(arch: str = "") -> ConfigDict:
    """The recipe for a smaller network, `arch`."""
    config = default()
    config.model.arch = arch or "mobilenet_v3_small"
    config.data.source = "tfds:cifar10"
    config.data.image_size = 224
    config.data.batch_size = 128
    config.optim.lr = 0.02
    config.optim.nesterov = True
    config.optim.weight_decay = 5e-4
    config.optim.warmup_epochs = 1.0
    config.train.teacher = "runs/cifar10"  # where `--config configs/cifar10.py` leaves it
    config.train.temperature = 4.0
    config.train.epochs = 30.0  # a teacher's answers to augmented images wear out later than labels
    config.train.precision = "auto"
    if arch == "resnet10_w16":
        config.model.weights, config.data.image_size = "sample", 64
    return config
