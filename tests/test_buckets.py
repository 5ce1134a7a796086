"""Runs, weights and data in buckets, of servers on this machine that speak the real protocols."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jaxsft import buckets, cli, patience, storage
from jaxsft.data import embedded, listing, prepare
from jaxsft.data.base import Options
from jaxsft.data.sources import open_source
from jaxsft.models import weights
from jaxsft.run import pretrained
from tests import buckets as servers
from tests.commands import assert_refused, run_command

SCHEME = {"google": "gs", "amazon": "s3"}


@pytest.mark.parametrize("kind", ["google", "amazon"])
def test_any_bytes_arrive(kind: str, tmp_path: Path) -> None:
    """Also those that the lines between the parts of an upload end in, or are made of."""
    contents = [
        b"",
        b"\r",
        b"ends in\r",
        b"in\n",
        b"in\r\n",
        b"\r\nbegins",
        b"has\n--==0==--\nit",
        b"\0",
        bytes(range(256)),
    ]
    with getattr(servers, kind)() as server, servers.environment(server.environment):
        for number, content in enumerate(contents):
            place = storage.location(f"{SCHEME[kind]}://bucket/{number}")
            assert place.create(content) and place.read_bytes() == content
            place.write_bytes(content)
            assert place.read_bytes() == content
            (tmp_path / "file").write_bytes(content)
            place.upload(tmp_path / "file")
            assert place.read_bytes() == content
            place.download(tmp_path / "file")
            assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("kind", ["google", "amazon"])
def test_objects_are_written_whole_and_made_once(kind: str, tmp_path: Path) -> None:
    with getattr(servers, kind)() as server, servers.environment(server.environment):
        folder = storage.location(f"{SCHEME[kind]}://bucket/folder")
        assert not folder.exists() and not folder.is_dir() and folder.walk() == {}
        assert (folder / "lock").create(b"mine")
        assert not (folder / "lock").create(b"yours")
        assert (folder / "lock").read_text() == "mine"
        (folder / "lock").write_bytes(b"ours")
        (folder / "deep" / "er").write_bytes(b"x" * 100)
        assert folder.is_dir() and (folder / "deep").is_dir() and (folder / "lock").is_file()
        assert [str(path) for path in folder.iterdir()] == [f"{folder}/deep", f"{folder}/lock"]
        assert {name: entry.size for name, entry in folder.walk().items()} == {"deep/er": 100, "lock": 4}
        assert abs(folder.walk()["lock"].changed_ns / 1e9 - time.time()) < 60
        (tmp_path / "file").write_bytes(np.random.default_rng(0).bytes(6_000_000))  # in several pieces
        (folder / "file").upload(tmp_path / "file")
        with storage.local_copy(folder / "file") as copy:
            assert copy.name == "file" and copy.read_bytes() == (tmp_path / "file").read_bytes()
        (folder / "lock").unlink()
        (folder / "lock").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            (folder / "lock").read_bytes()


ADDRESSES = (
    ("ftp://host/run", "ftp:// is not known"),
    ("gs:bucket", ""),  # a file of that name, as any other
    ("gs://", "names no place in a bucket"),
    ("gs://bucket/../other", "names no place in a bucket"),
    ("s3:/bucket/run", ""),  # pathlib makes one slash of two
)


@pytest.mark.parametrize(("text", "wrong"), ADDRESSES)
def test_addresses(text: str, wrong: str) -> None:
    if wrong:
        with pytest.raises(cli.UserError, match=wrong):
            storage.location(text)
    else:
        assert str(storage.location(text)) == text.replace(":/b", "://b")


def test_an_extra_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.UserError, match=r"pip install 'jaxsft\[s3\]'"):
        storage.location("s3://bucket/run")


REFUSALS = (
    ("train --config=tests/small.py --workdir=gs://none/run", "gs://none/run can't be written: it is not there, or..."),
    (
        "train --config=tests/small.py --workdir=gz://bucket/run",
        "gz://bucket/run can't be used: gz:// is not known...",
    ),
    ("evaluate --workdir=gs://bucket/none", "gs://bucket/none holds no run; give the --workdir of..."),
    ("predict --workdir=gs://bucket/none gs://bucket/a.png", "gs://bucket/a.png can't be read: it is not there, or..."),
    ("convert to-flax gs://bucket/a.pth --arch resnet18 --out @/a", "gs://bucket/a.pth can't be read: it is not..."),
    ("convert to-torch gs://bucket/a --out @/a.pth", "gs://bucket/a/model.json can't be read: it is not there, or..."),
)


@pytest.mark.parametrize(("command", "expected"), REFUSALS)
def test_what_is_not_there_is_one_line(google, tmp_path: Path, command: str, expected: str) -> None:
    assert_refused(command, expected, tmp_path)
    assert not any(tmp_path.iterdir())


ANY_PLACE = (  # all that a command may be given a place in a bucket for
    "train --config=tests/small.py --workdir=gs://bucket/run",
    "train --config=tests/small.py --workdir=@/run --config.data.source=folder:gs://bucket/pictures",
    "train --config=tests/small.py --workdir=@/run --config.data.source=csv:gs://bucket/list.csv",
    "train --config=tests/small.py --workdir=@/run --config.data.source=tfds:cifar10 --config.data.data_dir=gs://bucket/a",
    "train --config=tests/small.py --workdir=@/run --config.model.weights=gs://bucket/ported",
    "evaluate --workdir=gs://bucket/run",
    "predict --workdir=@/none gs://bucket/a.png",
    "export --workdir=gs://bucket/run --format torch --out @/a.pth",
    "convert to-flax gs://bucket/a.pth --arch resnet18 --out @/a",
    f"convert to-flax {embedded.WEIGHTS} --arch resnet10_w16 --out gs://bucket/a",
    "convert to-torch gs://bucket/a --out @/a.pth",
    f"convert verify gs://bucket/a --against {embedded.WEIGHTS}",
    "parity --arch resnet18 --weights gs://bucket/a.pth",
    "parity --arch resnet18 --json gs://bucket/a.json",
    "data.show --config=tests/small.py --out=gs://bucket/a.png",
)


@pytest.mark.parametrize("command", ANY_PLACE)
@pytest.mark.parametrize("why", ["there is nobody", "the bucket does not permit it"])
def test_a_bucket_that_gives_nothing_is_one_line(google, tmp_path: Path, monkeypatch, why: str, command: str) -> None:
    monkeypatch.setattr(patience, "FIRST_PATIENCE", 0.1)
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    if why == "there is nobody":
        monkeypatch.setattr("gcsfs.core.GCSFileSystem._request", away)
    else:
        monkeypatch.setattr(google, "answer", lambda method, address: 403)
    status, said = run_command(command, tmp_path)
    assert status == 2, said
    assert re.search(f"^error: gs://bucket.*: {why}; .*\\n$", said, re.MULTILINE), said
    assert not any(tmp_path.iterdir())
    patience.HEALTH.clear()


def test_a_bucket_that_can_only_be_read_is_one_line(google, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(google, "read_only", True)
    denied = "can't be written: the bucket does not permit it; give another --workdir"
    assert_refused("train --config=tests/small.py --workdir=gs://bucket/run", f"gs://bucket/run {denied}", tmp_path)


def test_missing_credentials_are_one_line(monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    missing = {"AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none", "AWS_EC2_METADATA_DISABLED": "true"}
    with servers.environment(missing):
        expected = "s3://bucket/run can't be written: there are no credentials for it: `aws configure`; give..."
        assert_refused("train --config=tests/small.py --workdir=s3://bucket/run", expected, tmp_path)


def test_requests_that_fail_for_a_while_are_made_again(google, place) -> None:
    google.refusing = 2
    place.write_bytes(b"x")
    assert place.read_bytes() == b"x" and not google.refusing


def test_a_bucket_that_is_gone_is_given_up_once_for_all_requests(google, place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 3.0)
    monkeypatch.setattr(patience, "SAID_AFTER", 0.0)
    monkeypatch.setattr("gcsfs.core.GCSFileSystem._request", away)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(OSError, match="there is nobody"):
            place.read_bytes()
    assert 3 < time.monotonic() - began < 9  # not three times
    assert capsys.readouterr().err == "warning: gs://bucket: there is nobody; asked again for 3 s\n"
    monkeypatch.undo()
    place.write_bytes(b"x")
    assert patience.HEALTH["gs://bucket"] == patience.Health(has_answered=True)


async def away(*args: object, **kwargs: object) -> None:
    """What the connection to a server that is gone raises."""
    raise ConnectionRefusedError("there is nobody")


def make_folder(root: Path) -> None:
    """Twenty pictures of two classes, of several sizes."""
    rng = np.random.default_rng(0)
    for number in range(20):
        file = root / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (30 + number, 40, 3), np.uint8)).save(file)


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_pictures_in_a_bucket_are_those_of_the_disk(google, place, tmp_path: Path, monkeypatch, kind: str) -> None:
    make_folder(tmp_path / "pictures")
    lines = [f"{p.relative_to(tmp_path / 'pictures')},{p.parent.name}" for p in (tmp_path / "pictures").rglob("*.png")]
    (tmp_path / "pictures" / "list.csv").write_text("\n".join(["path,label", *sorted(lines)]))
    storage.upload(tmp_path / "pictures", place)
    end = "/list.csv" if kind == "csv" else ""
    here = open_source(f"{kind}:{tmp_path}/pictures{end}", "train", Options())
    google.requests.clear()
    listing.forget()
    monkeypatch.setenv("JAXSFT_CACHE", str(place / "cache"))
    there = open_source(f"{kind}:{place}{end}", "train", Options())
    assert (there.class_names, there.listing) == (here.class_names, here.listing)
    np.testing.assert_array_equal(there.labels, here.labels)
    for number in range(len(here)):
        np.testing.assert_array_equal(np.asarray(there[number]), np.asarray(here[number]))
    open_source(f"{kind}:{place}{end}", "val", Options())
    assert sum("prefix=" in request and "delimiter=&" in f"{request}&" for request in google.requests) <= 1
    assert (place / "cache" / "index").is_dir()


def test_a_prepared_set_in_a_bucket_is_that_of_the_disk(
    google, place, realdata: Path, tmp_path: Path, monkeypatch
) -> None:
    (prepared,) = (realdata / "tfds" / "cifar10").iterdir()
    for file in prepared.iterdir():
        if "-train" not in file.name:
            (place / "data" / "cifar10" / prepared.name / file.name).upload(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no copy is there yet
    here = open_source("tfds:cifar10", "test[:50]", Options(data_dir=str(realdata / "tfds")))
    there = open_source("tfds:cifar10", "test[:50]", Options(data_dir=str(place / "data")))
    np.testing.assert_array_equal(there.labels, here.labels)
    np.testing.assert_array_equal(there[49], here[49])


def test_a_set_is_prepared_into_a_bucket(google, place, monkeypatch, tmp_path: Path) -> None:
    def prepare_(name: str, data_dir: str) -> str:
        made = Path(data_dir) / name / "1.0.0"
        made.mkdir(parents=True)
        for file in ("dataset_info.json", "features.json", "records"):
            (made / file).write_text(file)
        return str(made)

    monkeypatch.setattr(prepare, "prepare", prepare_)
    status, said = run_command(f"data.prepare cifar10 --data-dir {place}", tmp_path)
    assert status == 0, said
    written = {name.rpartition("/")[2]: entry.changed_ns for name, entry in place.walk().items()}
    assert sorted(written, key=lambda name: written[name])[-1] == "dataset_info.json"  # which makes it a set
    assert sorted(written) == ["dataset_info.json", "features.json", "records"]


def test_ports_and_compiled_programs_are_kept_in_a_bucket(google, place, cifar7: Path, monkeypatch) -> None:
    monkeypatch.setenv("JAXSFT_CACHE", str(place))
    variables, card = pretrained.load_pretrained("sample", "resnet10_w16")
    monkeypatch.setattr(pretrained, "run_module", lambda *_: pytest.fail("it was ported again"))
    again, same = pretrained.load_pretrained("sample", "resnet10_w16")
    assert same == card
    np.testing.assert_array_equal(again["params"]["fc"]["bias"], variables["params"]["fc"]["bias"])
    (kept,) = (place / "ported").iterdir()
    assert weights.ModelCard.load(kept) == card
    (kept / "model.json").write_bytes(b"{")
    with pytest.raises(BaseException, match="ported again"):  # a damaged one is made anew
        pretrained.load_pretrained("sample", "resnet10_w16")
