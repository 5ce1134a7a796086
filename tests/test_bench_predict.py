"""`jaxsft.bench predict`: as many sizes as pictures, and both sides predict all of them."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest

from jaxsft.bench.predict import write_pictures
from tests.commands import assert_refused, hear_command


def test_every_picture_has_a_size_of_its_own(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 6)
    sizes = {PIL.Image.open(path).size for path in paths}
    assert len(sizes) == 6 and any(w > h for w, h in sizes) and any(h > w for w, h in sizes)


@pytest.mark.parametrize("option", ["--images 0", "--rounds 0", "--workers 0", "--batch-size -1"])
def test_wrong_amounts_are_one_line(option: str, tmp_path: Path) -> None:
    assert_refused(
        f"bench predict {option}", f"argument {option.replace(' ', ': ')} is not 1 or more; see ...", tmp_path
    )


def test_it_is_asked_for_without_a_file(tmp_path: Path) -> None:
    """What is sent to the contestants' processes can be pickled."""
    status, said, _ = hear_command("bench predict --images 2 --image-size 32 --batch-size 2 --rounds 1", tmp_path)
    assert status == 0 and said.startswith("predict  images/s: jaxsft ")


@pytest.mark.full
def test_a_small_run(tmp_path: Path) -> None:
    options = "--images 6 --image-size 32 --batch-size 4 --rounds 1 --against torch --json @/out.json"
    status, said, _ = hear_command(f"bench predict {options}", tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    assert status == 0 and said.startswith("predict  images/s: jaxsft ")
    assert found["ratio"] == pytest.approx(found["images_per_sec"] / found["against"]["torch"]["images_per_sec"])
    assert found["against"]["torch"]["layout"] in ("channels_last", "NCHW") and found["first_seconds"] > 0
