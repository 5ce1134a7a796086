"""The config of a run: its keys with the values that they have, and what is wrong with these.

A file in configs/ defines `get_config(variant)`, which starts from `default()` and changes what its task needs; the
command line overrides single keys (`--config.optim.lr=0.02`). `check` finds what is wrong before any work is done.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxsft.cli import UserError, nearest
from jaxsft.keys import KEYS

# Keys by which a resumed run may differ from what it was: they change how it is computed, not what. When it is
# evaluated is one; what it is evaluated on (data.eval_split) is none: the lines of one log must be comparable.
FREE = ("eval.", "checkpoint.", "parallel.backend", "parallel.timeout_seconds", "data.data_dir", "data.workers",
        "data.on_error", "data.check_overlap", "train.on_nan", "train.on_changed_data", "train.log_every_steps",
        "train.steps_per_call")  # fmt: skip
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text, '' for none", tuple: "a tuple"}


def default() -> ConfigDict:
    """Every key with its default."""
    config = ConfigDict()
    for key in KEYS:
        section = key.name.rpartition(".")[0]
        if section and section not in config:
            config[section] = ConfigDict()
        put(config, key.name, placeholder(key.kind) if key.default is None else key.default)
    return config


@functools.cache
def kinds() -> dict[str, tuple[type, bool]]:
    """For every key the type of its values, and whether it may be None instead; by name, as a ConfigDict lists them."""
    return {
        key.name: (key.kind if key.default is None else type(key.default), key.default is None)
        for key in sorted(KEYS, key=lambda key: key.name)
    }


def wanted(name: str) -> str:
    """What the value of a key must be, as in `it must be a number, above 0`."""
    must = next(key.allowed.text for key in KEYS if key.name == name)
    type_, _ = kinds()[name]
    return ", ".join(filter(None, (KINDS[type_] if type_ in (bool, int, float) or not must else "", must)))


def check_keys(config: ConfigDict) -> None:
    """Raise a UserError where the keys of a config are not those of `default`, or the type of a value is not.

    Raises:
      UserError: a key that is missing, or not known, or holds something else.
    """
    known, given = kinds(), flatten(config.to_dict())
    for name in [*given, *known]:
        if name not in known:
            raise UserError(f"the config has a key {name!r} that means nothing", nearest(name, sorted(known)))
        if name not in given:
            raise UserError(f"the config has no key {name!r}", "let it start from jaxsft.config.default()")
        type_, may_be_none = known[name]
        value = given[name]
        fits = may_be_none if value is None else isinstance(value, (int, float) if type_ is float else type_)
        if not fits or (isinstance(value, bool) and type_ is not bool):
            raise UserError(f"config.{name} is {value!r}", f"it must be {wanted(name)}")


def check(config: ConfigDict) -> None:
    """Raise a UserError for the first setting that can't be meant, or does not go with another.

    Raises:
      UserError: a key, its value, what it must be.
    """
    check_keys(config)
    for key in KEYS:
        value = get(config, key.name)
        if not key.allowed.admits(value):
            raise UserError(f"config.{key.name} is {value!r}", f"it must be {key.allowed.text}")
        for name in key.allowed.unknown(value):
            verb = "has" if isinstance(value, tuple) else "is"
            raise UserError(f"config.{key.name} {verb} {name!r}", nearest(name, key.allowed.known()))
    for is_so, what, what_to_do in conflicts(config):
        if is_so:
            raise UserError(what, what_to_do)


def conflicts(config: ConfigDict) -> tuple[tuple[bool, str, str], ...]:
    """Whether settings that are fine by themselves do not go together, what is wrong, and what to do: a row each."""
    from jaxsft.data.augment import ERASING, RANDOM_CROP  # as in jaxsft.keys

    model, data, optim, train = config.model, config.data, config.optim, config.train
    augment, resize, warmup = data.augment, data.resize_size, optim.warmup_steps
    several = bool(data.label_delimiter)
    keeps = train.method == "probe" and train.keep_features
    return (
        (
            RANDOM_CROP in augment[1:],
            f"config.data.augment is {augment}",
            f"{RANDOM_CROP} comes first, and once",
        ),
        (
            ERASING in augment[:-1],
            f"config.data.augment is {augment}",
            f"{ERASING} comes last, and once",
        ),
        (
            resize is not None and resize < data.image_size,
            f"config.data.resize_size is {resize}",
            f"it must be image_size {data.image_size} or more",
        ),
        (
            resize is not None and data.preset == "weights",
            f"config.data.resize_size is {resize} and config.data.preset is 'weights'",
            "leave out resize_size, or set the preset to 'config'",
        ),
        (
            data.batch_size % optim.accumulate != 0,
            f"config.data.batch_size {data.batch_size} is not divisible by optim.accumulate {optim.accumulate}",
            "change one of them",
        ),
        (
            optim.name in ("sgd", "lars", "muon") and optim.nesterov and not optim.momentum,
            "config.optim.nesterov needs a momentum",
            "set --config.optim.momentum=0.9 or --noconfig.optim.nesterov",
        ),
        (
            optim.name in ("sgd", "lars") and bool(optim.betas),
            f"config.optim.betas is {optim.betas}, and {optim.name} has none",
            "leave them out: --config.optim.betas=",
        ),
        (
            optim.name in ("sgd", "lars", "lion") and optim.eps is not None,
            f"config.optim.eps is {optim.eps}, and {optim.name} has none",
            "leave it out: --config.optim.eps=None",
        ),
        (
            bool(optim.l2_sp) and not model.weights,
            "config.optim.l2_sp without config.model.weights has nothing to stay near to",
            "name weights, or set --config.optim.weight_decay instead",
        ),
        (
            bool(model.classes) and model.num_classes not in (None, len(model.classes)),
            f"config.model.classes has {len(model.classes)} names, and config.model.num_classes is {model.num_classes}",
            "leave out num_classes",
        ),
        (
            bool(model.classes) and model.head != "auto",
            f"config.model.classes decides on the head by name, and config.model.head is {model.head!r}",
            "leave out one of them",
        ),
        (
            bool(model.classes) and not model.weights,
            "config.model.classes without config.model.weights has no head to change",
            "name weights whose classes have names, such as a run",
        ),
        (
            bool(model.freeze) and not model.weights,
            "config.model.freeze without config.model.weights keeps random numbers",
            "name weights, or freeze nothing",
        ),
        (
            model.batch_norm == "frozen" and not model.weights,
            "config.model.batch_norm='frozen' without config.model.weights has no statistics to keep",
            "name weights, or set --config.model.batch_norm=train",
        ),
        (
            bool(model.unfreeze) and not model.freeze,
            "config.model.unfreeze without config.model.freeze has nothing that could begin later",
            "freeze what is to wait, such as --config.model.freeze='^(?!fc)'",
        ),
        (
            train.steps is None and any(epoch >= train.epochs for _, epoch in model.unfreeze),
            f"config.model.unfreeze is {model.unfreeze}, and the run ends at epoch {train.epochs:g}",
            "begin earlier, or train longer",
        ),
        (
            optim.schedule == "onecycle" and bool(optim.warmup_epochs if warmup is None else warmup),
            "config.optim.schedule is 'onecycle', which has a warm-up of its own",
            "set --config.optim.warmup_epochs=0 and leave out warmup_steps; onecycle_warmup says how long its own is",
        ),
        (
            optim.schedule_by == "epoch" and optim.schedule == "onecycle",
            "config.optim.schedule is 'onecycle', which changes the rate at every update",
            "set --config.optim.schedule_by=step",
        ),
        (
            optim.schedule_by == "epoch" and warmup is not None,
            f"config.optim.warmup_steps is {warmup} and config.optim.schedule_by is 'epoch'",
            "set warmup_epochs instead, or --config.optim.schedule_by=step",
        ),
        (
            optim.schedule_by == "epoch" and optim.warmup_epochs % 1 != 0,
            f"config.optim.warmup_epochs is {optim.warmup_epochs} and config.optim.schedule_by is 'epoch'",
            "warm up for whole epochs, or set --config.optim.schedule_by=step",
        ),
        (
            train.method != "full" and not model.weights,
            f"config.train.method={train.method!r} without config.model.weights probes random features",
            "name weights, or set --config.train.method=full",
        ),
        (
            keeps and bool(train.mixup or train.cutmix),
            "config.train.mixup and cutmix mix images, and a probe that keeps features sees none",
            "leave them out, or set --noconfig.train.keep_features",
        ),
        (
            keeps and bool(train.teacher or data.unlabelled),
            "config.train.teacher and data.unlabelled are about images, and a probe that keeps features sees none",
            "leave them out, or set --noconfig.train.keep_features",
        ),
        (
            train.method == "probe" and bool(model.unfreeze),
            "config.model.unfreeze lets more train later, and of config.train.method='probe' only the head trains",
            "set --config.train.method=full and freeze what is to wait, or take lp-ft",
        ),
        (
            train.steps is None and warmup is None and optim.warmup_epochs >= train.epochs,
            "config.optim.warmup_epochs is not shorter than config.train.epochs",
            "warm up for less, or train longer",
        ),
        (
            bool(data.unlabelled) and train.loss != "cross_entropy",
            f"config.data.unlabelled is {data.unlabelled} and config.train.loss is {train.loss!r}",
            "set it to cross_entropy: FixMatch gives an image the one class that it is surely of",
        ),
        (
            bool(train.ema and train.swa_epochs),
            "config.train.ema and config.train.swa_epochs are two averages",
            "set one of them",
        ),
        (
            train.steps is None and train.swa_epochs > train.epochs,
            f"config.train.swa_epochs {train.swa_epochs} is more than the {train.epochs:g} of config.train.epochs",
            "average over fewer, or train longer",
        ),
        (
            train.steps is not None and warmup is not None and warmup >= train.steps,
            f"config.optim.warmup_steps {warmup} is not less than config.train.steps {train.steps}",
            "warm up for less, or train longer",
        ),
        (
            train.loss == "focal" and train.label_smoothing > 0,
            f"config.train.loss is 'focal' and config.train.label_smoothing is {train.label_smoothing:g}",
            "set --config.train.label_smoothing=0, or take another loss",
        ),
        (
            several and not data.source.startswith("csv:"),
            f"config.data.label_delimiter is {data.label_delimiter!r}, and config.data.source is {data.source}",
            "leave it out: a table, csv:FILE, has images with several labels",
        ),
        (
            several and train.loss == "cross_entropy",
            "config.train.loss is 'cross_entropy', and with config.data.label_delimiter images have several labels",
            "set --config.train.loss=bce or focal",
        ),
        (
            several and data.sampling == "balanced",
            "config.data.sampling is 'balanced', and with config.data.label_delimiter images have several labels",
            "set it to shuffle; --config.train.class_weights=balanced weighs the classes",
        ),
        (
            data.per_class is not None and data.fraction < 1,
            "config.data.per_class and config.data.fraction both say how much to train on",
            "set one of them",
        ),
    )


def get(config: ConfigDict, key: str) -> Any:
    """The value under a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Set the value under a dotted key.

    Raises:
      KeyError, TypeError: a locked config has no such key, or a value of another type there.
    """
    section, _, leaf = key.rpartition(".")
    (get(config, section) if section else config)[leaf] = value


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
        put(config, key, as_tuple(value) if isinstance(value, list) else value)
    return config


def as_tuple(value: Any) -> Any:
    """Lists, also nested, as tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value
