"""Wrong input of every command: one line that says what is wrong and what to do, status 2, and no file left behind."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsft import config as config_module
from jaxsft.models.weights import ModelCard
from tests.commands import assert_refused, run_command

SAMPLE = "train --config configs/cifar10.py:sample --workdir @/new"


class Evil:
    """What `weights_only` is there for."""

    def __reduce__(self):
        return (print, ("run by a pickle",))


def make_place(place: Path) -> None:
    """The files that the commands below name; @ stands for the folder."""
    (place / "file").write_text("no run")
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").touch()
    (place / "empty").mkdir()
    (place / "no_image.png").write_text("text")
    (place / "evil.pth").write_bytes(pickle.dumps({"fc.bias": Evil()}))
    (place / "text.pth").write_text("not a zip")
    (place / "text.safetensors").write_text("not a header")
    (place / "long.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    save_file({"fc.bias": np.zeros(10, np.float32)}, place / "few.safetensors")
    save_file({"conv1.weight": np.zeros(10, np.float32)}, place / "headless.safetensors")
    card = ModelCard("resnet10_w16", 10)
    for name, change in CARDS.items():
        folder = place / name
        folder.mkdir()
        (folder / "config.json").write_text(config_module.to_json(config_module.default()))
        fields = {**dataclasses.asdict(card), **change} if isinstance(change, dict) else change
        (folder / "model.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    (place / "no_json").mkdir()
    (place / "no_json" / "config.json").write_text("{")


# folder -> what its model.json has that a model card may not have
CARDS = {
    "no_checkpoint": {},
    "bad_arch": {"arch": "resnet19"},
    "bad_classes": {"num_classes": 10**12},
    "bad_names": {"class_names": ["cat"]},
    "bad_size": {"preprocessing": {"resize_size": 10**9}},
    "bad_mean": {"preprocessing": {"mean": [0, 0, float("nan")]}},
    "bad_std": {"preprocessing": {"std": [1, 1, 0]}},
    "bad_field": {"owner": "me"},
    "bad_nesting": "[" * 100_000,
}


# (command, what stderr says after "error: "); "..." at the end stands for any rest, where another library words it.
CASES: tuple[tuple[str, str], ...] = (
    ("train --config configs/cifar10.py:smaple", "configs/cifar10.py has no variant 'smaple'; did you mean 'sample'?"),
    ("train --config configs/cifar10.py:sample rest", "'rest' is no option; give options as --name=value"),
    (SAMPLE + " --config.optim.lrr=0.1", "the config has no key 'optim.lrr'; did you mean --config.optim.lr?"),
    (SAMPLE + " --config.optimm.lr=0.1", "the config has no key 'optimm.lr'; did you mean --config.optim.lr?"),
    (SAMPLE + " --workdirr=x", "there is no option --workdirr; did you mean --workdir?"),
    (SAMPLE + " --config.optim.lr=fast", "config.optim.lr is 'fast'; it must be a number, above 0"),
    (SAMPLE + " --config.optim.lr=-1", "config.optim.lr is -1.0; it must be above 0"),
    (SAMPLE + " --config.optim.lr=nan", "config.optim.lr is nan; it must be above 0"),
    (SAMPLE + " --config.optim.lr=inf", "config.optim.lr is inf; it must be above 0"),
    (SAMPLE + " --config.optim.momentum=1", "config.optim.momentum is 1.0; it must be 0 to below 1"),
    (SAMPLE + " --config.optim.name=adan", "config.optim.name is 'adan'; it must be 'sgd', 'adamw', 'lamb', ..."),
    (
        SAMPLE + " --config.optim.schedule=cosin",
        "config.optim.schedule is 'cosin'; it must be 'constant', 'cosine', 'linear', 'step', ...",
    ),
    (
        SAMPLE + " --config.optim.momentum=0",
        "config.optim.nesterov needs a momentum; set --config.optim.momentum=0.9 or --noconfig.optim.nesterov",
    ),
    (SAMPLE + " --config.optim.weight_decay=-0.1", "config.optim.weight_decay is -0.1; it must be 0 or more"),
    (SAMPLE + " --config.optim.layer_decay=0", "config.optim.layer_decay is 0.0; it must be above 0, at most 1"),
    (
        SAMPLE + " --config.train.class_weights='(1.0, -1.0)'",
        "config.train.class_weights is (1.0, -1.0); it must be numbers of 0 or more, not all 0, or 'balanced'",
    ),
    (
        SAMPLE + " --config.train.class_weights='(1.0, 2.0)'",
        "config.train.class_weights has 2 numbers; give one for each of 10 classes",
    ),
    (SAMPLE + " --config.train.loss=bcee", "config.train.loss is 'bcee'; it must be 'cross_entropy', 'bce' or 'focal'"),
    (SAMPLE + " --config.train.focal_gamma=-1", "config.train.focal_gamma is -1.0; it must be 0 or more"),
    (
        SAMPLE + " --config.train.loss=focal --config.train.label_smoothing=0.1",
        "config.train.loss is 'focal' and config.train.label_smoothing is 0.1; set --config.train.label_smoothing=0,"
        " or take another loss",
    ),
    (
        SAMPLE + " --config.data.label_delimiter=ab",
        "config.data.label_delimiter is 'ab'; it must be '' or one character, no letter and no digit",
    ),
    (
        SAMPLE + " --config.data.label_delimiter=';' --config.train.loss=bce",
        "config.data.label_delimiter is ';', and config.data.source is sample; leave it out: a table, csv:FILE, has"
        " images with several labels",
    ),
    (
        SAMPLE + " --config.data.source=csv:a.csv --config.data.label_delimiter=';'",
        "config.train.loss is 'cross_entropy', and with config.data.label_delimiter images have several labels; set"
        " --config.train.loss=bce or focal",
    ),
    (
        SAMPLE + " --config.data.source=csv:a.csv --config.data.label_delimiter=' ' --config.train.loss=focal"
        " --config.data.sampling=balanced",
        "config.data.sampling is 'balanced', and with config.data.label_delimiter images have several labels; set it to"
        " shuffle; --config.train.class_weights=balanced weighs the classes",
    ),
    (SAMPLE + " --config.train.steps_per_call=0", "config.train.steps_per_call is 0; it must be 1 to 1000"),
    ("bench tpu --topology v9:2x2", "--topology is 'v9:2x2'; it must be one of v4, v5e, v5p, v6e, a colon and ..."),
    ("bench train --image-size 8", "config.data.image_size is 8; it must be 32 to 4096"),
    (SAMPLE + " --config.optim.clip_norm=-1", "config.optim.clip_norm is -1.0; it must be 0 or more"),
    (SAMPLE + " --config.optim.accumulate=0", "config.optim.accumulate is 0; it must be 1 or more"),
    (
        SAMPLE + " --config.optim.accumulate=3",
        "config.data.batch_size 100 is not divisible by optim.accumulate 3; change one of them",
    ),
    (
        SAMPLE + " --config.optim.warmup_epochs=999",
        "config.optim.warmup_epochs is not shorter than config.train.epochs; warm up for less, or train longer",
    ),
    (
        SAMPLE + " \"--config.optim.lr_multipliers=(('fc',),)\"",
        "config.optim.lr_multipliers is (('fc',),); it must be a tuple of pairs ...",
    ),
    (
        SAMPLE + " --config.model.arch=vit_b_32 --config.model.weights= --config.data.image_size=40",
        "config.data.image_size is 40; it must be a multiple of 32",
    ),
    (
        SAMPLE + " --config.model.dropout=0.1",
        "config.model.dropout is 0.1, and resnet10_w16 has none; leave it out: --config.model.dropout=None",
    ),
    (
        SAMPLE + " \"--config.optim.lr_multipliers=(('layer9', 2.0),)\"",
        "config.optim.lr_multipliers: 'layer9' matches no parameter; paths look like ...",
    ),
    (SAMPLE + " --config.seed=-1", "config.seed is -1; it must be 0 to 2**63 - 1"),
    (SAMPLE + " --config.seed=one", "config.seed is 'one'; it must be a whole number, 0 to 2**63 - 1"),
    (SAMPLE + " --config.model.arch=resnet8", "config.model.arch is 'resnet8'; did you mean 'resnet18'?"),
    (
        SAMPLE + " --config.model.weights=@/none.pth",
        "no file @/none.pth; name a .pth or .safetensors file or one of `python -m convert list`",
    ),
    (
        SAMPLE + " --config.model.weights=@/evil.pth",
        "@/evil.pth is refused, it is damaged or holds more than weights: ...",
    ),
    (
        SAMPLE + " --config.model.weights=@/empty",
        "@/empty/model.json can't be read: No such file or directory; make the directory with...",
    ),
    (SAMPLE + " --config.model.num_classes=0", "config.model.num_classes is 0; it must be None or 1 and more"),
    (SAMPLE + " --config.model.num_classes=5", "config.model.num_classes is 5; the data has 10 classes"),
    (SAMPLE + " --config.model.head_init=ones", "config.model.head_init is 'ones'; it must be 'torch' or 'zeros'"),
    (SAMPLE + " --config.model.batch_norm=eval", "config.model.batch_norm is 'eval'; it must be 'train' or 'frozen'"),
    (
        SAMPLE + " --config.model.weights= --config.model.batch_norm=frozen",
        "config.model.batch_norm='frozen' without config.model.weights has no statistics to keep; name weights, or ...",
    ),
    (
        SAMPLE + " \"--config.model.freeze=('layer5',)\"",
        "config.model.freeze: 'layer5' matches no parameter; paths look like ...",
    ),
    (
        SAMPLE + " \"--config.model.freeze=('(',)\"",
        "config.model.freeze is ('(',); it must be a tuple of regular expressions",
    ),
    (
        SAMPLE + " \"--config.model.freeze=('',)\"",
        "config.model.freeze is ('',); it must be a tuple of regular expressions",
    ),
    (
        SAMPLE + " \"--config.model.freeze=('.',)\"",
        "config.model.freeze covers every parameter; leave some to train, such as fc",
    ),
    (SAMPLE + " --config.data.source=cifar10", "unknown data source 'cifar10'; ..."),
    (SAMPLE + " --config.data.source=tfds:cifarr10", "TFDS has no data set 'cifarr10'; did you mean 'cifar10'?"),
    (SAMPLE + " --config.data.source=folder:@/none", "folder:@/none is no folder; ..."),
    (SAMPLE + " --config.data.train_split=trian", "sample has no split 'trian': ..."),
    (SAMPLE + ' "--config.data.train_split=train[:0]"', "split 'train[:0]' of sample is empty; name another slice"),
    (
        SAMPLE + ' "--config.data.train_split=train[:50]"',
        "config.data.batch_size 100 is more than the 50 training images; take 50 or less",
    ),
    (SAMPLE + " --config.data.image_size=16", "config.data.image_size is 16; it must be 32 to 4096"),
    (SAMPLE + " --config.data.resize_size=32", "config.data.resize_size is 32; it must be image_size 64 or more"),
    (SAMPLE + " --config.data.batch_size=0", "config.data.batch_size is 0; it must be 1 or more"),
    (SAMPLE + " \"--config.data.augment=('flipp',)\"", "config.data.augment has 'flipp'; did you mean 'flip'?"),
    (SAMPLE + ' "--config.data.mean=(0.5, 0.5)"', "config.data.mean is (0.5, 0.5); it must be three numbers"),
    (
        SAMPLE + ' "--config.data.std=(0.5, 0.5, 0.0)"',
        "config.data.std is (0.5, 0.5, 0.0); it must be three numbers above 0",
    ),
    (SAMPLE + " --config.train.epochs=0", "config.train.epochs is 0.0; it must be above 0"),
    (SAMPLE + " --config.train.steps=0", "config.train.steps is 0; it must be None or 1 and more"),
    (SAMPLE + " --config.train.label_smoothing=1", "config.train.label_smoothing is 1.0; it must be 0 to below 1"),
    (SAMPLE + " --config.train.ema=1", "config.train.ema is 1.0; it must be 0 to below 1"),
    (
        SAMPLE + " --config.train.precision=float64",
        "config.train.precision is 'float64'; it must be 'float32', 'bfloat16', 'float16' or 'auto'",
    ),
    (SAMPLE + " --config.train.on_nan=skip", "config.train.on_nan is 'skip'; it must be 'stop' or 'ignore'"),
    (SAMPLE + " --config.eval.every_epochs=0", "config.eval.every_epochs is 0.0; it must be above 0"),
    (SAMPLE + " --config.checkpoint.every_steps=0", "config.checkpoint.every_steps is 0; it must be 1 or more"),
    (SAMPLE + " --config.checkpoint.keep=0", "config.checkpoint.keep is 0; it must be 1 or more"),
    (
        SAMPLE + " --config.checkpoint.best_metric=accuracyy",
        "config.checkpoint.best_metric is 'accuracyy'; it must be '', 'accuracy', 'top5', 'loss', 'map', 'f1_micro' or"
        " 'f1_macro'",
    ),
    (SAMPLE + " --config.parallel.backend=pjit", "config.parallel.backend is 'pjit'; it must be 'pmap' or 'shard_map'"),
    (
        SAMPLE + " --config.parallel.batch_norm=synced",
        "config.parallel.batch_norm is 'synced'; it must be 'local' or 'sync'",
    ),
    (
        SAMPLE + " --coordinator here:1",
        "--num-processes and --process-id not given; give all of --coordinator, --num-processes, --process-id",
    ),
    (
        SAMPLE + " --coordinator here --num-processes 2 --process-id 0",
        "--coordinator is 'here'; it must be HOST:PORT of process 0",
    ),
    (
        SAMPLE + " --coordinator here:1 --num-processes two --process-id 0",
        "--num-processes is 'two'; it must be a whole number",
    ),
    (
        SAMPLE + " --coordinator here:1 --num-processes 2 --process-id 2",
        "--process-id is 2 of 2 processes; they count from 0",
    ),
    (
        "train --config configs/cifar10.py:sample --workdir @/file",
        "@/file can't be written: Not a directory; give another --workdir",
    ),
    (
        "train --config configs/cifar10.py:sample --workdir @/full",
        "@/full is not empty and holds no run; give another --workdir",
    ),
    ("train --config configs/cifar10.py:sample --workdir @/no_json", "@/no_json/config.json can't be read: ..."),
    (
        "train --config configs/cifar10.py:sample --workdir @/no_checkpoint",
        "@/no_checkpoint holds a run of another config: data.batch_size (128 there, 100 here), ...",
    ),
    ("evaluate", "the following arguments are required: --workdir; see `python -m jaxsft.evaluate --help`"),
    ("evaluate --workdir @/none", "@/none holds no run; give the --workdir of `python -m jaxsft.train`"),
    ("evaluate --workdir @/no_checkpoint", "@/no_checkpoint has no checkpoint yet; train longer"),
    ("evaluate --workdir @/no_json", "@/no_json/config.json can't be read: ..."),
    (
        "evaluate --workdir @/bad_arch",
        "@/bad_arch/model.json is not a model card: unknown arch 'resnet19'; did you mean 'resnet18'?; ...",
    ),
    (
        "evaluate --workdir @/bad_classes",
        "@/bad_classes/model.json is not a model card: num_classes is 1000000000000; port the weights again",
    ),
    (
        "evaluate --workdir @/bad_names",
        "@/bad_names/model.json is not a model card: 1 class names for 10 classes; port the weights again",
    ),
    (
        "evaluate --workdir @/bad_size",
        "@/bad_size/model.json is not a model card: sizes 1000000000, 224; port the weights again",
    ),
    (
        "evaluate --workdir @/bad_mean",
        "@/bad_mean/model.json is not a model card: mean and std are three numbers each; port the weights again",
    ),
    (
        "evaluate --workdir @/bad_std",
        "@/bad_std/model.json is not a model card: std is (1, 1, 0), it must be above 0; port the weights again",
    ),
    ("evaluate --workdir @/bad_field", "@/bad_field/model.json is not a model card: ..."),
    ("evaluate --workdir @/bad_nesting", "@/bad_nesting/model.json is not a model card: ..."),
    (
        "predict --workdir @/no_checkpoint",
        "the following arguments are required: IMAGE_OR_FOLDER; see `python -m jaxsft.predict --help`",
    ),
    (
        "predict --workdir @/no_checkpoint @/none.png",
        "@/none.png can't be read: No such file or directory; name images or folders of images",
    ),
    (
        "predict --workdir @/no_checkpoint @/empty",
        "no image in @/empty; name images or folders of ...",
    ),
    ("predict --workdir @/no_checkpoint @/no_image.png --topk 0", "--topk is 0; it must be 1 or more"),
    ("predict --workdir @/no_checkpoint @/no_image.png", "@/no_checkpoint has no checkpoint yet; train longer"),
    (
        "export --workdir @/no_checkpoint --format tf --out @/out",
        "--format tf is not supported; known: torch, safetensors, stablehlo, onnx, int8, hf, card",
    ),
    (
        "export --workdir @/none --format torch --out @/out.pth",
        "@/none holds no run; give the --workdir of `python -m jaxsft.train`",
    ),
    (
        "convert to-flax @/text.pth --arch resnet10_w16 --out @/out",
        "@/text.pth is refused, it is damaged or holds more than weights: ...",
    ),
    (
        "convert to-flax @/evil.pth --arch resnet10_w16 --out @/out",
        "@/evil.pth is refused, it is damaged or holds more than weights: ...",
    ),
    (
        "convert to-flax @/text.safetensors --arch resnet10_w16 --out @/out",
        "@/text.safetensors is not a whole .safetensors file: ...",
    ),
    (
        "convert to-flax @/long.safetensors --arch resnet10_w16 --out @/out",
        "@/long.safetensors is not a whole .safetensors file: ...",
    ),
    (
        "convert to-flax @/few.safetensors --arch resnet10_w16 --out @/out",
        "the weights do not fit resnet10_w16: missing: bn1.running_mean, bn1.running_var,...",
    ),
    (
        "convert to-flax @/headless.safetensors --arch resnet10_w16 --out @/out",
        "the weights do not fit resnet10_w16: missing: bn1.running_mean, bn1.running_var,...",
    ),
    (
        "convert to-flax @/file --arch resnet10_w16 --out @/out",
        "@/file is no known kind of file; give one of .safetensors, .pth, .pt",
    ),
    (
        "convert to-flax @/few.safetensors --arch resnet8 --out @/out",
        "unknown arch 'resnet8'; did you mean 'resnet18'?",
    ),
    (
        "convert to-torch @/empty --out @/out.pth",
        "@/empty/model.json can't be read: No such file or directory; make the directory with...",
    ),
    ("convert to-torch @/no_checkpoint --out @/out.onnx", "the weights in @/no_checkpoint can't be read: ..."),
    (
        "convert verify @/empty --against @/few.safetensors",
        "@/empty/model.json can't be read: No such file or directory; make the directory with...",
    ),
    ("parity --arch resnet19", "unknown arch 'resnet19'; did you mean 'resnet18'?"),
    ("parity --arch resnet18 --batch-size 1", "--batch-size is 1; batch norm trains on 2 images and more"),
    ("bench train --rounds 0", "argument --rounds: 0 is not 1 or more; see ..."),
    ("bench train --seconds nan", "argument --seconds: nan is not above 0; see ..."),
    ("bench train --batch-size 0", "argument --batch-size: 0 is not 1 or more; see ..."),
    ("bench data --passes 0", "argument --passes: 0 is not 1 or more; see ..."),
    ("bench run --epochs -1", "argument --epochs: -1 is not above 0; see ..."),
    ("bench nothing", "argument command: invalid choice: 'nothing'..."),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("place")
    make_place(path)
    return path


@pytest.mark.parametrize(("command", "expected"), CASES, ids=[command for command, _ in CASES])
def test_one_line_status_2_and_nothing_left(place: Path, command: str, expected: str) -> None:
    before = sorted(place.rglob("*"))
    assert_refused(command, expected, place)
    assert sorted(place.rglob("*")) == before


def test_there_are_enough_of_them() -> None:
    assert len({command for command, _ in CASES}) >= 60


@pytest.mark.parametrize("command", ["evaluate", "export", "parity", "predict", "train", "convert", "data.prepare"])
def test_help(command: str, place: Path) -> None:
    assert run_command(f"{command} --help", place) == (0, "")
