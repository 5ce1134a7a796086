"""Every setting of a run: its default, its meaning, and what is allowed.

A file in configs/ defines `get_config(variant)`, which starts from `default()` and changes what its task needs; the
command line overrides single keys (`--config.optim.lr=0.02`). `check` finds what is wrong before any work is done.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxsft.cli import UserError, nearest
from jaxsft.models.families import ARCHITECTURES

SCHEDULES = ("constant", "cosine", "linear", "step")
OPTIMIZERS = ("sgd", "adamw")
BEST_METRICS = ("", "accuracy", "top5", "loss")
# Keys by which a resumed run may differ from what it was: they change how it is computed, not what. When it is
# evaluated is one; what it is evaluated on (data.eval_split) is none: the lines of one log must be comparable.
FREE = ("eval.", "checkpoint.", "parallel.backend", "parallel.timeout_seconds", "data.data_dir", "data.workers",
        "data.on_error", "data.check_overlap", "train.on_nan", "train.on_changed_data", "train.log_every_steps",
        "train.steps_per_call")  # fmt: skip


def default() -> ConfigDict:
    """The defaults: torch's where torch has one, else what a careful fine-tuning run would use.

    The comment beside a key, or on the lines above it, is its meaning: --help shows it.
    """
    config = ConfigDict()
    config.seed = 0  # of new weights, the order of the data, augmentation and dividing; all else is determined by it

    config.model = model = ConfigDict()
    model.arch = "resnet18"  # as torchvision calls it, or resnet10_w16, a small one for 64 px
    # '' = from scratch | 'sample' | a torchvision name (IMAGENET1K_V1) | a file of PyTorch's or .safetensors | a ported
    # directory | the workdir of a run
    model.weights = "IMAGENET1K_V1"
    model.checkpoint = "last"  # of a run given as weights: 'last' | 'best' | a step
    model.num_classes = placeholder(int)  # None: as many as the data has
    # 'auto': the weights' own where its class names are the data's, else a fresh one | 'keep' | 'replace'
    model.head = "auto"
    model.head_init = "torch"  # of a fresh head: 'torch': U(+-1/sqrt(fan_in)) | 'zeros'
    model.freeze = ()  # regular expressions searched in parameter paths such as 'layer1_0/conv1/kernel'
    model.batch_norm = "train"  # 'train' | 'frozen': running statistics everywhere; frozen layers always use them

    config.data = data = ConfigDict()
    data.source = "tfds:cifar10"  # 'tfds:NAME' | 'folder:PATH' | 'csv:FILE' | 'hf:NAME' | 'sample' | a registered one
    data.data_dir = ""  # of TFDS; '' = its own default
    data.train_split = "train"  # what is trained on; slices such as train[:90%] too
    data.eval_split = ""  # '' = the first of validation, val, valid and test that the data has
    data.eval_fraction = 0.1  # of each class, to evaluate on where the files have no split of their own
    data.fraction = 1.0  # of each class to train on, for low-data work
    data.per_class = placeholder(int)  # not None: instead of fraction, so many training images of each class
    data.class_order = "text"  # of folders and lists: 'text' as torchvision's ImageFolder (10 before 2) | 'numeric'
    data.on_error = "raise"  # at a broken image: 'raise' | 'skip' (listed in bad_files.txt)
    data.exif_orientation = True  # turn pictures upright as their EXIF tag says; torchvision's ImageFolder does not
    data.check_overlap = False  # warn of images that are both trained and evaluated on; decodes all of them
    data.resident_mb = 1024  # sets of one image size lie on the device as one array up to this; others are streamed
    data.workers = placeholder(int)  # processes that decode streamed images; None: one a core, at most 16; 0: none
    data.image_size = 224  # px, the side of the square the model sees
    data.resize_size = placeholder(int)  # px, the short side before the middle is cut out; None: image_size
    data.batch_size = 128  # global: over all devices of all processes
    data.last_batch = "drop"  # the last, partial batch of an epoch: 'drop' | 'keep' (trained on as it is)
    data.sampling = "shuffle"  # 'shuffle' | 'balanced': every class equally often
    data.augment = ("pad_crop", "flip")  # names of jaxsft.data.augment.AUGMENTATIONS, in their order
    data.crop_scale = (0.08, 1.0)  # of random_resized_crop: share of the area, from and to
    data.crop_ratio = (3 / 4, 4 / 3)  # of random_resized_crop: width / height, from and to
    data.jitter = (0.4, 0.4, 0.4, 0.1)  # of color_jitter: brightness, contrast, saturation, hue
    data.rand_augment = (2, 9)  # of rand_augment: operations, magnitude of 0..30
    data.erasing = 0.5  # of random_erasing: probability
    # 'config': resize_size, mean and std below | 'weights': those of the weights' model.json (256 or 232 px for 224)
    data.preset = "config"
    data.mean = (0.485, 0.456, 0.406)  # of red, green and blue in 0..1, subtracted
    data.std = (0.229, 0.224, 0.225)  # of red, green and blue in 0..1, divided by

    config.optim = optim = ConfigDict()
    optim.name = "sgd"  # 'sgd' | 'adamw'
    optim.lr = 0.01  # learning rate: the peak, after the warm-up and before the schedule lowers it
    optim.momentum = 0.9  # of sgd: how much of the last update goes on
    optim.nesterov = False  # of sgd: Nesterov's momentum
    optim.weight_decay = 0.0  # coupled for sgd (torch: added to the gradient), decoupled for adamw
    optim.decay_norm_and_bias = True  # whether norms and biases decay too: torch decays every parameter
    optim.no_decay = ()  # kinds of parameters that do not decay
    optim.schedule = "cosine"  # 'constant' | 'cosine' | 'linear' (both to 0) | 'step'
    optim.warmup_epochs = 0.0  # over which the rate rises from 0 in a straight line
    optim.step_epochs = 30.0  # of the schedule 'step': multiply by step_factor every so many epochs
    optim.step_factor = 0.1  # of the schedule 'step'
    optim.layer_decay = 1.0  # every stage nearer the image has its rate multiplied by this once more
    optim.lr_multipliers = ()  # pairs (regular expression, factor): the first that is found in a path counts
    optim.clip_norm = 0.0  # 0 = off; torch.nn.utils.clip_grad_norm_ before weight decay
    optim.accumulate = 1  # micro-batches an update: as many examples, less memory

    config.train = train = ConfigDict()
    train.epochs = 10.0  # passes over the training images; fractions too
    train.steps = placeholder(int)  # not None: instead of epochs, so many updates
    train.label_smoothing = 0.0  # share of each label that is spread over all classes
    train.class_weights = ()  # a factor on the loss of each class, as torch.nn.CrossEntropyLoss(weight=...); (): none
    train.mixup = 0.0  # alpha of mixup, 0 = off; with cutmix too a coin decides at each step
    train.cutmix = 0.0  # alpha of cutmix, 0 = off
    train.ema = 0.0  # decay of the moving average of parameters and batch statistics that is evaluated; 0 = off
    train.precision = "float32"  # 'float32' | 'bfloat16': of activations; parameters and sums stay float32
    train.remat = False  # keep less for the backward pass and compute it again: a larger batch fits, a step is slower
    train.steps_per_call = 1  # updates that the device makes at one call of the host, where a step takes milliseconds
    train.log_every_steps = 50  # updates that a line of metrics.jsonl is about
    train.on_nan = "stop"  # at a loss or parameter that is NaN or infinite: 'stop' | 'ignore'
    train.on_changed_data = "stop"  # a resumed run finds other classes, images or order: 'stop' | 'continue'

    config.eval = evaluation = ConfigDict()
    evaluation.every_epochs = 1.0  # epochs between evaluations; the last update is followed by one in any case

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500  # updates between checkpoints; the last update is followed by one in any case
    checkpoint.keep = 2  # how many stay, the newest; the best by best_metric besides
    checkpoint.best_metric = ""  # keep the best too: '' = off | 'accuracy' | 'top5' | 'loss' of an evaluation

    config.parallel = parallel = ConfigDict()
    parallel.backend = "pmap"  # 'pmap' | 'shard_map'
    parallel.batch_norm = "local"  # 'local': each device its own statistics, a CPU being one | 'sync': over all devices
    parallel.timeout_seconds = 300  # how long the processes of a run wait for each other
    return config


def is_pattern(value: Any) -> bool:
    """Whether `value` is a regular expression that compiles."""
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False


def is_rgb(value: Any) -> bool:
    """Whether `value` is three finite numbers."""
    return len(value) == 3 and all(isinstance(x, int | float) and abs(x) < float("inf") for x in value)


def is_range(value: Any) -> bool:
    """Whether `value` is two finite numbers above 0 in their order."""
    low, high = value
    return 0 < low <= high < float("inf")


def is_jitter(value: Any) -> bool:
    """Whether `value` is changes of brightness, contrast, saturation and hue."""
    return len(value) == 4 and all(0 <= x < float("inf") for x in value) and value[3] <= 0.5


def is_rand_augment(value: Any) -> bool:
    """Whether `value` is a number of operations and a magnitude."""
    operations, magnitude = value
    return isinstance(operations, int) and 1 <= operations <= 10 and 0 <= magnitude <= 30


def are_weights(value: Any) -> bool:
    """Whether `value` is no or some finite numbers of 0 and more."""
    return all(0 <= x < float("inf") for x in value) and (not value or max(value) > 0)


def are_multipliers(value: Any) -> bool:
    """Whether `value` is pairs of a regular expression and a factor of 0 or more."""
    return all(len(pair) == 2 and is_pattern(pair[0]) and 0 <= pair[1] < float("inf") for pair in value)


# (key, what it must be, test). One row a promise; `check` reads them in order.
CHECKS: tuple[tuple[str, str, Any], ...] = (
    ("seed", "0 to 2**63 - 1", lambda v: 0 <= v < 2**63),
    ("model.num_classes", "None or 1 and more", lambda v: v is None or v >= 1),
    ("model.checkpoint", "'last', 'best' or a step", lambda v: v in ("last", "best") or v.isdecimal()),
    ("model.head", "'auto', 'keep' or 'replace'", lambda v: v in ("auto", "keep", "replace")),
    ("model.head_init", "'torch' or 'zeros'", lambda v: v in ("torch", "zeros")),
    ("model.freeze", "a tuple of regular expressions", lambda v: all(is_pattern(p) for p in v)),
    ("model.batch_norm", "'train' or 'frozen'", lambda v: v in ("train", "frozen")),
    ("data.source", "'tfds:NAME', 'folder:PATH', 'csv:FILE', 'hf:NAME' or 'sample'", bool),
    ("data.train_split", "a split such as train[:90%]", bool),
    ("data.eval_fraction", "above 0, below 1", lambda v: 0 < v < 1),
    ("data.fraction", "above 0, at most 1", lambda v: 0 < v <= 1),
    ("data.per_class", "None or 1 and more", lambda v: v is None or v >= 1),
    ("data.class_order", "'text' or 'numeric'", lambda v: v in ("text", "numeric")),
    ("data.on_error", "'raise' or 'skip'", lambda v: v in ("raise", "skip")),
    ("data.resident_mb", "0 or more", lambda v: v >= 0),
    ("data.workers", "None or 0 to 256", lambda v: v is None or 0 <= v <= 256),
    ("data.last_batch", "'drop' or 'keep'", lambda v: v in ("drop", "keep")),
    ("data.sampling", "'shuffle' or 'balanced'", lambda v: v in ("shuffle", "balanced")),
    ("data.crop_scale", "two shares of the area, 0 < low <= high <= 1", lambda v: is_range(v) and v[1] <= 1),
    ("data.crop_ratio", "two ratios, 0 < low <= high", is_range),
    ("data.jitter", "four numbers of 0 or more, the last at most 0.5", is_jitter),
    ("data.rand_augment", "two numbers, operations 1 to 10 and magnitude 0 to 30", is_rand_augment),
    ("data.erasing", "0 to 1", lambda v: 0 <= v <= 1),
    ("data.augment", "a tuple of names", lambda v: all(isinstance(name, str) for name in v)),
    ("data.image_size", "32 to 4096", lambda v: 32 <= v <= 4096),
    ("data.resize_size", "None or image_size to 4096", lambda v: v is None or v <= 4096),
    ("data.batch_size", "1 or more", lambda v: v >= 1),
    ("data.preset", "'config' or 'weights'", lambda v: v in ("config", "weights")),
    ("data.mean", "three numbers", is_rgb),
    ("data.std", "three numbers above 0", lambda v: is_rgb(v) and min(v) > 0),
    ("optim.name", " or ".join(map(repr, OPTIMIZERS)), lambda v: v in OPTIMIZERS),
    ("optim.lr", "above 0", lambda v: 0 < v < float("inf")),
    ("optim.momentum", "0 to below 1", lambda v: 0 <= v < 1),
    ("optim.weight_decay", "0 or more", lambda v: 0 <= v < float("inf")),
    ("optim.schedule", " or ".join(map(repr, SCHEDULES)), lambda v: v in SCHEDULES),
    ("optim.warmup_epochs", "0 or more", lambda v: 0 <= v < float("inf")),
    ("optim.step_epochs", "above 0", lambda v: 0 < v < float("inf")),
    ("optim.step_factor", "above 0", lambda v: 0 < v < float("inf")),
    ("optim.layer_decay", "above 0, at most 1", lambda v: 0 < v <= 1),
    ("optim.lr_multipliers", "a tuple of pairs (regular expression, factor of 0 or more)", are_multipliers),
    ("optim.clip_norm", "0 or more", lambda v: 0 <= v < float("inf")),
    ("optim.accumulate", "1 or more", lambda v: v >= 1),
    ("train.epochs", "above 0", lambda v: 0 < v < float("inf")),
    ("train.steps", "None or 1 and more", lambda v: v is None or v >= 1),
    ("train.label_smoothing", "0 to below 1", lambda v: 0 <= v < 1),
    ("train.class_weights", "numbers of 0 or more, not all 0", are_weights),
    ("train.mixup", "0 or more", lambda v: 0 <= v < float("inf")),
    ("train.cutmix", "0 or more", lambda v: 0 <= v < float("inf")),
    ("train.ema", "0 to below 1", lambda v: 0 <= v < 1),
    ("train.precision", "'float32' or 'bfloat16'", lambda v: v in ("float32", "bfloat16")),
    ("train.steps_per_call", "1 to 1000", lambda v: 1 <= v <= 1000),
    ("train.log_every_steps", "1 or more", lambda v: v >= 1),
    ("train.on_nan", "'stop' or 'ignore'", lambda v: v in ("stop", "ignore")),
    ("train.on_changed_data", "'stop' or 'continue'", lambda v: v in ("stop", "continue")),
    ("eval.every_epochs", "above 0", lambda v: 0 < v < float("inf")),
    ("checkpoint.every_steps", "1 or more", lambda v: v >= 1),
    ("checkpoint.keep", "1 or more", lambda v: v >= 1),
    ("checkpoint.best_metric", " or ".join(map(repr, BEST_METRICS)), lambda v: v in BEST_METRICS),
    ("parallel.backend", "'pmap' or 'shard_map'", lambda v: v in ("pmap", "shard_map")),
    ("parallel.batch_norm", "'local' or 'sync'", lambda v: v in ("local", "sync")),
    ("parallel.timeout_seconds", "1 or more", lambda v: v >= 1),
)


# (whether settings that are fine by themselves do not go together, what is wrong, what to do)
CONFLICTS: tuple[tuple[Callable[[ConfigDict], bool], str, str], ...] = (
    (
        lambda c: c.optim.name == "sgd" and c.optim.nesterov and not c.optim.momentum,
        "config.optim.nesterov needs a momentum",
        "set --config.optim.momentum=0.9 or --noconfig.optim.nesterov",
    ),
    (
        lambda c: bool(c.model.freeze) and not c.model.weights,
        "config.model.freeze without config.model.weights keeps random numbers",
        "name weights, or freeze nothing",
    ),
    (
        lambda c: c.model.batch_norm == "frozen" and not c.model.weights,
        "config.model.batch_norm='frozen' without config.model.weights has no statistics to keep",
        "name weights, or set --config.model.batch_norm=train",
    ),
    (
        lambda c: c.train.steps is None and c.optim.warmup_epochs >= c.train.epochs,
        "config.optim.warmup_epochs is not shorter than config.train.epochs",
        "warm up for less, or train longer",
    ),
    (
        lambda c: c.data.per_class is not None and c.data.fraction < 1,
        "config.data.per_class and config.data.fraction both say how much to train on",
        "set one of them",
    ),
)


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text, '' for none", tuple: "a tuple"}


@functools.cache
def kinds() -> dict[str, tuple[type, bool]]:
    """For every key the type of its values, and whether it may be None instead."""
    config = default()
    sections = dict.fromkeys(key.rpartition(".")[0] for key in flatten(config.to_dict()))
    found: dict[str, tuple[type, bool]] = {}
    for name in sections:
        section = get(config, name) if name else config
        prefix = f"{name}." if name else ""
        found |= {prefix + leaf: (section.get_type(leaf), section[leaf] is None) for leaf in section}
    return {key: entry for key, entry in found.items() if entry[0] is not ConfigDict}


def wanted(key: str) -> str:
    """What the value of a key must be, as in `it must be a number, above 0`."""
    must = next((must for name, must, _ in CHECKS if name == key), "")
    type_, _ = kinds()[key]
    return ", ".join(filter(None, (KINDS[type_] if type_ in (bool, int, float) or not must else "", must)))


def check_keys(config: ConfigDict) -> None:
    """Raise a UserError where the keys of a config are not those of `default`, or the type of a value is not.

    Raises:
      UserError: a key that is missing, or not known, or holds something else.
    """
    known, given = kinds(), flatten(config.to_dict())
    for key in [*given, *known]:
        if key not in known:
            raise UserError(f"the config has a key {key!r} that means nothing", nearest(key, sorted(known)))
        if key not in given:
            raise UserError(f"the config has no key {key!r}", "let it start from jaxsft.config.default()")
        type_, may_be_none = kinds()[key]
        value = given[key]
        fits = may_be_none if value is None else isinstance(value, (int, float) if type_ is float else type_)
        if not fits or (isinstance(value, bool) and type_ is not bool):
            raise UserError(f"config.{key} is {value!r}", f"it must be {wanted(key)}")


def check(config: ConfigDict) -> None:
    """Raise a UserError for the first setting that can't be meant, or does not go with another.

    Raises:
      UserError: a key, its value, what it must be.
    """
    from jaxsft.data.augment import AUGMENTATIONS, ERASING, RANDOM_CROP

    check_keys(config)
    for key, must, test in CHECKS:
        value = get(config, key)
        try:
            good = test(value)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise UserError(f"config.{key} is {value!r}", f"it must be {must}")
    if config.model.arch not in ARCHITECTURES:
        raise UserError(f"config.model.arch is {config.model.arch!r}", nearest(config.model.arch, list(ARCHITECTURES)))
    for name in config.data.augment:
        if name not in AUGMENTATIONS:
            raise UserError(f"config.data.augment has {name!r}", nearest(str(name), list(AUGMENTATIONS)))
    for name, place, index in ((RANDOM_CROP, "first", 0), (ERASING, "last", -1)):
        if name in config.data.augment and (config.data.augment[index] != name or config.data.augment.count(name) > 1):
            raise UserError(f"config.data.augment is {config.data.augment}", f"{name} comes {place}, and once")
    resize = config.data.resize_size
    if resize is not None and resize < config.data.image_size:
        raise UserError(
            f"config.data.resize_size is {resize}", f"it must be image_size {config.data.image_size} or more"
        )
    if resize is not None and config.data.preset == "weights":
        raise UserError(
            f"config.data.resize_size is {resize} and config.data.preset is 'weights'",
            "leave out resize_size, or set the preset to 'config'",
        )
    if config.data.batch_size % config.optim.accumulate:
        raise UserError(
            f"config.data.batch_size {config.data.batch_size} is not divisible by optim.accumulate"
            f" {config.optim.accumulate}",
            "change one of them",
        )
    for is_so, what, what_to_do in CONFLICTS:
        if is_so(config):
            raise UserError(what, what_to_do)


def get(config: ConfigDict, key: str) -> Any:
    """The value under a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} as {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as JSON text; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """`to_json` backwards, over today's defaults.

    Raises:
      ValueError: not JSON.
      KeyError, TypeError: a key that does not exist today, a value of another type.
    """
    config = default().lock()
    for key, value in flatten(json.loads(text)).items():
        *parents, leaf = key.split(".")
        parent = get(config, ".".join(parents)) if parents else config
        parent[leaf] = as_tuple(value) if isinstance(value, list) else value
    return config


def as_tuple(value: Any) -> Any:
    """Lists, also nested, as tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value
