"""The command line of a run: `--config FILE[:VARIANT] [--config.KEY=VALUE ...]` and a command's own options.

What ml_collections' config_flags take is taken (--key=value, --key value, --nokey for false, tuples as Python writes
them), and what people type besides: None, yes and no, 1e2 for a hundred, words with commas between for a tuple.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
import textwrap
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft import recipes
from jaxsft.cli import UserError, write_output
from jaxsft.config import kinds, wanted
from jaxsft.keys import KEYS, Key

BOOLEANS = dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "f", "n", "0"), False
)
# What other programs call a key, or an option of ours.
OTHER_NAMES = {
    "optim.lr": "learning_rate base_lr",
    "optim.name": "optimizer opt",
    "optim.schedule": "scheduler lr_scheduler lr_schedule sched",
    "optim.weight_decay": "wd l2",
    "optim.warmup_epochs": "warmup",
    "optim.warmup_steps": "num_warmup_steps warmup_iters",
    "optim.lr_scaling": "lr_base_scale scale_lr",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2 opt_betas",
    "optim.eps": "epsilon adam_epsilon opt_eps",
    "optim.trust_coefficient": "trust_coeff",
    "optim.schedule_by": "sched_on_updates",
    "optim.power": "poly_power lr_power",
    "optim.onecycle_warmup": "pct_start",
    "optim.step_epochs": "step_size",
    "optim.step_factor": "gamma",
    "optim.clip_norm": "clip_grad grad_clip max_grad_norm gradient_clip_val",
    "optim.accumulate": "grad_accum accumulation_steps gradient_accumulation_steps accumulate_grad_batches",
    "data.batch_size": "batch bs per_device_train_batch_size",
    "data.image_size": "img_size imgsz input_size crop_size train_crop_size resolution",
    "data.resize_size": "val_resize_size",
    "data.source": "data dataset dataset_name data_path folder train_dir",
    "data.eval_split": "val_split test_split",
    "data.workers": "num_workers",
    "data.cache": "cache_dir cache_path cache_dataset",
    "data.augment": "augmentation augmentations",
    "data.erasing": "reprob random_erase random_erasing",
    "model.arch": "model backbone network",
    "model.weights": "pretrained ckpt init_checkpoint",
    "model.unfreeze": "unfreeze_at gradual_unfreezing unfreeze_backbone_at_epoch",
    "model.num_classes": "nb_classes num_labels",
    "model.classes": "class_names label_names id2label",
    "train.method": "linear_probe linear_probing training_strategy freeze_backbone",
    "train.epochs": "epoch num_epochs max_epochs num_train_epochs",
    "train.steps": "max_steps num_steps total_steps",
    "train.precision": "amp dtype mixed_precision fp16 bf16",
    "train.matmul_precision": "tf32 allow_tf32 float32_matmul_precision",
    "train.ema": "ema_decay model_ema",
    "train.label_smoothing": "smoothing",
    "train.loss": "criterion loss_fn loss_function bce_loss",
    "train.focal_gamma": "focal_loss_gamma",
    "train.class_weights": "class_weight weight",
    "data.label_delimiter": "label_delim label_separator label_sep",
    "train.mixup": "mixup_alpha",
    "train.cutmix": "cutmix_alpha",
    "train.log_every_steps": "log_interval log_every print_freq logging_steps",
    "eval.every_epochs": "eval_every eval_freq eval_interval",
    "checkpoint.every_steps": "save_every save_freq save_steps checkpoint_every",
    "parallel.batch_norm": "sync_bn",
    "seed": "random_seed",
    "workdir": "out out_dir output output_dir log_dir logdir save_dir model_dir run_dir resume",
    "num-processes": "world_size",
    "process-id": "rank",
}


def parse_flags(
    argv: Sequence[str], usage: str, strings: dict[str, str], switches: Collection[str] = ()
) -> tuple[ConfigDict, dict[str, str], str]:
    """Read a command line of `--config FILE[:VARIANT] [--config.KEY=VALUE ...]` and the options named in `strings`.

    Args:
      argv: the arguments after the program's name.
      usage: what --help prints first.
      strings: further options of one text value each, and their help.
      switches: those of them that have no value: theirs is 'on' where they are given.

    Returns:
      The locked config, the values of the further options ('' where not given), and FILE[:VARIANT] as typed. Of what
      is given twice the last counts; tuples given for one key are joined.

    Raises:
      UserError: an unknown option or key, a value of the wrong type, a config file that can't be used.
      SystemExit: --help.
    """
    if {"--help", "-help", "-h"} & set(argv):
        write_output(sys.stdout, "\n".join([*help_lines(usage, strings), ""]))
        raise SystemExit(0)
    values = {"config": "", **dict.fromkeys(strings, "")}
    changes: dict[str, Any] = {}
    for name, text in options(argv, strings, switches):
        if name in values:
            values[name] = text
        else:
            key = name.removeprefix("config.")
            value = read(key, text)
            changes[key] = changes.get(key, ()) + value if isinstance(value, tuple) else value
    config_flag = values.pop("config")
    if not config_flag.partition(":")[0]:
        raise UserError("no config", "give --config configs/cifar10.py or another file")
    config = recipes.load(config_flag)
    for key, value in changes.items():
        config_module.put(config, key, value)
    config.lock()
    return config, values, config_flag


def options(
    argv: Sequence[str], strings: Mapping[str, str], switches: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """The options of a command line: ('config', 'config.KEY' or one of `strings`, its value).

    Raises:
      UserError: what is none, or has no value, or one that it can't have.
    """
    tokens = iter(argv)
    for token in tokens:
        flag, equals, value = token.partition("=")
        name = re.sub("^--?", "", flag)
        key = re.sub("^(no)?config[.]", "", name)
        is_key, is_off = key != name and key in kinds(), name.startswith("noconfig.")
        if name == flag or not (is_key or name in ("config", *strings)):
            raise unknown(token, strings)
        if is_key and not equals and kinds()[key][0] is bool:
            value = str(not is_off)
        elif name in switches:
            if equals:
                raise UserError(f"{token} can't be: {flag} has no value", f"give {flag} alone")
            value = "on"
        elif is_off:
            raise UserError(f"{token} can't be", f"give --config.{key}=VALUE")
        elif not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise UserError(f"{flag} has no value", f"give it as {flag}=VALUE")
        yield (f"config.{key}" if is_key else name), value


def unknown(token: str, strings: Mapping[str, str]) -> UserError:
    """What to say of a word that is no option."""
    flag = token.partition("=")[0]
    key = re.sub("^-{1,2}(no)?config[.]", "", flag)
    is_option = bool(re.match("--?[^-]", flag))
    if key != flag and any(name.startswith(f"{key}.") for name in kinds()):
        example = next(name for name in kinds() if name.startswith(f"{key}."))
        return UserError(f"config.{key} is a group of keys", f"give one of them, such as --config.{example}=VALUE")
    meant = suggestion(flag, strings) if is_option or "=" in token else ""
    hint = f"did you mean {meant}?" if meant else "see --help for all there are"
    if key != flag:
        return UserError(f"the config has no key {key!r}", hint)
    if is_option:
        return UserError(f"there is no option {flag}", hint)
    return UserError(f"{token!r} is no option", hint if meant else "give options as --name=value")


def suggestion(name: str, strings: Mapping[str, str]) -> str:
    """The option that is meant by `name`, such as '--config.optim.lr' by '--learning-rate'; '' where none is near."""
    targets = {**{key: f"--config.{key}" for key in kinds()}, **{name: f"--{name}" for name in ("config", *strings)}}
    table: dict[str, list[str]] = {}
    for target, option in targets.items():
        leaf = target.rpartition(".")[2]
        for text in dict.fromkeys((target, leaf, *OTHER_NAMES.get(target, "").split())):
            table.setdefault(text.replace("-", "_"), []).append(option)
    whole = re.sub("^-*((no)?config[.])?", "", name).replace("-", "_").lower()
    leaf = whole.rpartition(".")[2]
    near = (difflib.get_close_matches(text, table, n=1, cutoff=0.7) for text in (whole, leaf))
    for text in (whole, leaf, *(found for matches in near for found in matches)):
        if text in table:
            return " or ".join(table[text])
    return ""


def read(key: str, text: str) -> Any:
    """The value of a key as `text` means it, of the key's type.

    Raises:
      UserError: it is none.
    """
    type_, may_be_none = kinds()[key]
    word = text.strip().lower()
    try:
        if word in ("none", "null") and (may_be_none or type_ is not str):
            return None if may_be_none else int(word)
        if type_ is bool:
            return BOOLEANS[word]
        if type_ is int:
            return whole_number(word)
        if type_ is float:
            return float(word)
        if type_ is tuple:
            return read_tuple(text)
        if text == "None":
            raise ValueError(text)
        return text
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"config.{key} is {text!r}", f"it must be {wanted(key)}") from None


def whole_number(text: str) -> int:
    """'100' and '1e2' as 100. Raises ValueError, OverflowError: it is none."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


def read_tuple(text: str) -> tuple[Any, ...]:
    """'flip' as ('flip',), 'pad_crop,flip' as ('pad_crop', 'flip'), '0.5,0.5' and '(0.5, 0.5)' as numbers, '' as ()."""
    text = text.strip()
    try:
        with warnings.catch_warnings(action="ignore"):  # of a backslash in a regular expression
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        inside = re.fullmatch(r"\((.*,.*)\)|\[(.*,.*)\]", text)
        words = (inside[1] or inside[2]) if inside else text
        return tuple(word.strip() for word in words.split(",") if word.strip())
    return config_module.as_tuple(value) if isinstance(value, list | tuple) else (value,)


def as_text(value: Any) -> str:
    """A value as `read` takes it."""
    if isinstance(value, tuple) and not any(isinstance(entry, tuple) for entry in value):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_lines(usage: str, strings: Mapping[str, str]) -> list[str]:
    """What --help prints: the usage, the command's options, and every key of the config."""
    return [
        usage.strip(),
        "",
        *entries((f"--{name}", text) for name, text in strings.items()),
        "",
        "Every key of the config, its default, which a config file may change, its meaning, and [what it may be]:",
        *entries((f"--config.{key.name}={as_text(key.default)}", key.meaning, f"[{choices(key)}]") for key in KEYS),
    ]


def choices(key: Key) -> str:
    """What the value of a key may be, and all the names where it is a name or some."""
    return ": ".join(filter(None, (wanted(key.name), ", ".join(key.allowed.known()))))


def entries(rows: Iterable[tuple[str, ...]], column: int = 42) -> list[str]:
    """Names, each followed by texts, as lines; the texts under each other, the next beside the last where it fits."""
    lines, width = [], 118 - column
    for name, *texts in rows:
        cell: list[str] = []
        for text in texts:
            wrapped = textwrap.wrap(text, width)
            fits = cell and len(cell[-1]) + 1 + len(text) <= width
            cell = [*cell[:-1], f"{cell[-1]} {text}"] if fits else [*cell, *wrapped]
        name = f"  {name}"
        lines += [f"{name:{column}}{cell.pop(0)}"] if len(name) < column else [name]
        lines += [" " * column + more for more in cell]
    return lines
