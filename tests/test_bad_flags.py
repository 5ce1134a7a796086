"""Wrong command lines and config files: one line that says what is wrong and what to do, status 2, and no file left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import assert_refused

SAMPLE = "train --config configs/cifar10.py:sample --workdir @/new"


# config file -> what its get_config() does
CONFIGS = {
    "raises": "return 1 / 0",
    "wrong_type": "default().optim.lr = 'fast'",
    "returns_dict": "return {'seed': 1}",
    "returns_none": "default()",
    "few_keys": "return type(default())({'seed': 1})",
    "own_type": "values = default().to_dict(); values['optim']['lr'] = 'fast'; return type(default())(values)",
    "more_keys": "config = default(); config.optim.lrr = 0.1; return config",
}


def make_place(place: Path) -> None:
    """The files that the commands below name; @ stands for the folder."""
    (place / "file").write_text("no config")
    (place / "full").mkdir()
    (place / "broken.py").write_text("def get_config(:\n")
    (place / "nothing.py").write_text("x = 1\n")
    (place / "latin1.py").write_bytes("café = 1\n".encode("latin-1"))
    for name, lines in CONFIGS.items():
        text = "from jaxsft.config import default\n\ndef get_config():\n    " + lines.replace("; ", "\n    ") + "\n"
        (place / f"{name}.py").write_text(text)


# (command, what stderr says after "error: "); "..." at the end stands for any rest, where another library words it.
CASES: tuple[tuple[str, str], ...] = (
    ("train", "no config; give --config configs/cifar10.py or another file"),
    ("train --config :sample", "no config; give --config configs/cifar10.py or another file"),
    ("train --config", "--config has no value; give it as --config=VALUE"),
    ("train --config --workdir=@/new", "--config has no value; give it as --config=VALUE"),
    (
        "train --config configs/cifar10.py:sample --print-parameters=yes",
        "--print-parameters=yes can't be: --print-parameters has no value; give --print-parameters alone",
    ),
    ("train --config @/zzz.py", "there is no config file @/zzz.py; known: configs/cifar10.py, ..."),
    ("train --config @/brokn.py", "there is no config file @/brokn.py; did you mean @/broken.py?"),
    ("train --config cifar01:sample", "there is no config file cifar01; did you mean configs/cifar10.py?"),
    (
        "train --config=~/jaxsft_none/cifar10.py",
        f"there is no config file {Path.home()}/jaxsft_none/cifar10.py; did you mean configs/cifar10.py?",
    ),
    (
        "train --config gs://bucket/cifar10.py:sample",
        "gs://bucket/cifar10.py:sample can't be used: it is no place of this machine; name a file or folder that is",
    ),
    ("train --config @/full", "the config file @/full can't be read: Is a directory; ..."),
    ("train --config @/broken.py", "@/broken.py, line 1: ..."),
    ("train --config @/latin1.py", "@/latin1.py, line 1: ..."),
    (
        "train --config @/nothing.py",
        "the config file @/nothing.py defines no get_config; write it as in configs/cifar10.py",
    ),
    (
        "train --config @/raises.py",
        "@/raises.py, line 4: ZeroDivisionError: division by zero; mend the config file",
    ),
    (
        "train --config @/raises.py:small",
        "@/raises.py: get_config: TypeError: get_config() takes 0 positional arguments but 1 was given;"
        " leave out the :small",
    ),
    ("train --config @/wrong_type.py", "@/wrong_type.py, line 4: TypeError: ..."),
    (
        "train --config @/returns_dict.py",
        "get_config of @/returns_dict.py returns a dict; let it return what jaxsft.config.default() gave, with changes",
    ),
    (
        "train --config @/returns_none.py",
        "get_config of @/returns_none.py returns a NoneType; ...",
    ),
    (
        "train --config @/few_keys.py",
        "the config has no key 'checkpoint.best_metric'; let it start from jaxsft.config.default()",
    ),
    ("train --config @/own_type.py", "config.optim.lr is 'fast'; it must be a number, above 0"),
    ("train --config @/more_keys.py", "the config has a key 'optim.lrr' that means nothing; did you mean 'optim.lr'?"),
    (SAMPLE + " --config.optim.lr.rate=1", "the config has no key 'optim.lr.rate'; did you mean --config.optim.lr?"),
    (SAMPLE + " --config.zzz=1", "the config has no key 'zzz'; see --help for all there are"),
    (
        SAMPLE + " --config.optim=1",
        "config.optim is a group of keys; give one of them, such as --config.optim.accumulate=VALUE",
    ),
    (SAMPLE + " --lr=0.1", "there is no option --lr; did you mean --config.optim.lr?"),
    (SAMPLE + " --learning-rate 0.1", "there is no option --learning-rate; did you mean --config.optim.lr?"),
    (SAMPLE + " --config.lr=0.1", "the config has no key 'lr'; did you mean --config.optim.lr?"),
    (SAMPLE + " --config.learning_rate=0.1", "the config has no key 'learning_rate'; did you mean --config.optim.lr?"),
    (SAMPLE + " --output-dir=@/other", "there is no option --output-dir; did you mean --workdir?"),
    (SAMPLE + " --profile=0", "--profile is '0'; give the number of steps to trace, such as 10"),
    (SAMPLE + " --profile=all", "--profile is 'all'; give the number of steps to trace, such as 10"),
    (SAMPLE + " --zzz", "there is no option --zzz; see --help for all there are"),
    (SAMPLE + " optim.lr=0.1", "'optim.lr=0.1' is no option; did you mean --config.optim.lr?"),
    (SAMPLE + " --", "'--' is no option; give options as --name=value"),
    (SAMPLE + " --config.optim.lr", "--config.optim.lr has no value; give it as --config.optim.lr=VALUE"),
    (SAMPLE + " --noconfig.optim.lr", "--noconfig.optim.lr can't be; give --config.optim.lr=VALUE"),
    (SAMPLE + " --config.optim.lr=None", "config.optim.lr is 'None'; it must be a number, above 0"),
    (SAMPLE + " --config.optim.lr=0,1", "config.optim.lr is '0,1'; it must be a number, above 0"),
    (SAMPLE + " --config.model.weights=None", "config.model.weights is 'None'; it must be text, '' for none"),
    (SAMPLE + " --config.model.arch=None", "config.model.arch is 'None'; ..."),
    (SAMPLE + " --config.optim.nesterov=maybe", "config.optim.nesterov is 'maybe'; it must be true or false"),
    (SAMPLE + " --config.optim.nesterov=None", "config.optim.nesterov is 'None'; it must be true or false"),
    (SAMPLE + " --config.data.batch_size=1.5", "config.data.batch_size is '1.5'; it must be a whole number, 1 or more"),
    (SAMPLE + " --config.data.batch_size=inf", "config.data.batch_size is 'inf'; it must be a whole number, 1 or more"),
    (
        SAMPLE + " --config.train.steps=1e-2",
        "config.train.steps is '1e-2'; it must be a whole number, None or 1 and more",
    ),
    (SAMPLE + " --config.data.mean=None", "config.data.mean is 'None'; it must be three numbers"),
    (SAMPLE + " --config.data.mean=0.5", "config.data.mean is (0.5,); it must be three numbers"),
    (
        SAMPLE + " --config.data.mean=0.5,half,0.5",
        "config.data.mean is ('0.5', 'half', '0.5'); it must be three numbers",
    ),
    (SAMPLE + " --config.data.augment=pad_crop,flipp", "config.data.augment has 'flipp'; did you mean 'flip'?"),
    (SAMPLE + " --config.optim.no_decay=norm,nrom", "config.optim.no_decay has 'nrom'; did you mean 'norm'?"),
    (
        SAMPLE + " --config.data.interpolation=nearest",
        "config.data.interpolation is 'nearest'; it must be 'bilinear' or 'bicubic'",
    ),
    (SAMPLE + " '--config.data.augment=[[1]]'", "config.data.augment is ((1,),); it must be a tuple of names"),
    (
        SAMPLE + " --config.data.rand_augment=2.5,9",
        "config.data.rand_augment is (2.5, 9); it must be two numbers, operations 1 to 10 and magnitude 0 to 30",
    ),
    (SAMPLE + " --config.model.head=kept", "config.model.head is 'kept'; it must be 'auto', 'keep' or 'replace'"),
    (
        SAMPLE + " --config.model.checkpoint=first",
        "config.model.checkpoint is 'first'; it must be 'last', 'best' or a step",
    ),
    (
        SAMPLE + " --config.data.class_order=natural",
        "config.data.class_order is 'natural'; it must be 'text' or 'numeric'",
    ),
    (
        SAMPLE + " --config.train.on_changed_data=go",
        "config.train.on_changed_data is 'go'; it must be 'stop' or 'continue'",
    ),
    (SAMPLE + " --config.seed=18446744073709551616", "config.seed is 18446744073709551616; it must be 0 to 2**63 - 1"),
    ("__main__ trian", "python -m jaxsft takes no command, and was given 'trian'; did you mean 'train'?"),
    (
        "__main__ train --config x",
        "python -m jaxsft takes no command, and was given 'train'; give it as `python -m jaxsft.train`",
    ),
    ("data.show --config configs/cifar10.py:sample", "no --out; name the picture to write, such as --out=grid.png"),
    ("data.show --config configs/cifar10.py:sample --out @/grid", "--out @/grid is no name of a picture; ..."),
    (
        "data.show --config configs/cifar10.py:sample --out @/none/grid.png --config.data.source=folder:@/none",
        "@/none/grid.png can't be written: No such file or directory; name another file",
    ),
    (
        "data.show --config configs/cifar10.py:sample --out ftp://host/grid.png",
        "ftp://host/grid.png can't be used: ftp:// is not known; name a local path, or gs://BUCKET/… or s3://BUCKET/…",
    ),
    ("bench tpu --json @/none/out.json", "@/none/out.json can't be written: No such file or directory; ..."),
    ("bench tpu --json @/file/out.json", "@/file/out.json can't be written: Not a directory; ..."),
    ("bench tpu --json @/full", "@/full can't be written: Is a directory; name another file"),
    ("bench data --folder gs://bucket/set", "gs://bucket/set can't be used: it is no place of this machine; ..."),
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
