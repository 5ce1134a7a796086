"""From a source to batches on the devices: held there or streamed, it is the same data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from jaxsft.data.base import Arrays, Options, Source
from jaxsft.data.decode import onto_canvas
from jaxsft.data.loader import Stream, WithUnlabelled, layout_of, make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import EvalPlan, TrainPlan, in_memory
from jaxsft.models.weights import INTERPOLATIONS, Preprocessing
from jaxsft.run.parallel import DataParallel
from tests.pictures import Pictures

BATCH = 4
DEVICES = DataParallel()


PICTURES = Pictures(np.arange(10, dtype=np.int32) % 2)
SMALL = dataclasses.replace(PICTURES, size=(24, 32))
ORDER = Order(10, BATCH, seed=0)
TO = Preprocessing(48, 40)


def host(batch: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """A batch back from the devices, as one array a name."""
    return {name: np.asarray(value).reshape(-1, *value.shape[2:]) for name, value in batch.items()}


def loader(source: Source, plan, workers: int = 0, **options):
    return make_loader(source, plan, DEVICES, TO, workers=workers, **options)


@pytest.mark.parametrize("partners", [False, True])
def test_streamed_and_resident_are_the_same(partners: bool):
    """Images of one size: the array gathered on the device holds the pixels that the stream sends."""
    plan = TrainPlan(ORDER, partners)
    streamed, resident = loader(SMALL, plan), loader(in_memory(SMALL, Options()), plan)
    assert isinstance(streamed, Stream)
    assert resident.dataset["images"].shape == (10, 24, 32, 3)
    assert streamed.preprocessing == resident.preprocessing == TO
    for step in range(6):
        one, other = host(streamed.batch(step)), host(resident.batch(step))
        for role, prefix in (("example", ""), ("partner", "partner_"))[: 1 + partners]:
            np.testing.assert_array_equal(one[role], other[role])
            for name, whole in (("image", "images"), ("label", "labels")):
                np.testing.assert_array_equal(one[prefix + name], np.asarray(resident.dataset[whole])[other[role]])


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
def test_the_middle_of_photographs_is_torchvisions(mode: InterpolationMode):
    to = dataclasses.replace(TO, interpolation=mode.value)
    stream = make_loader(PICTURES, EvalPlan(10, BATCH), DEVICES, to, workers=0)
    assert stream.preprocessing == dataclasses.replace(to, resize_size=40)  # nothing is left to resize
    transform = transforms.Compose([transforms.Resize(48, mode), transforms.CenterCrop(40)])
    seen = []
    for batch in map(host, stream.batches()):
        for number, image in zip(batch["example"][batch["mask"]], batch["image"], strict=False):
            np.testing.assert_array_equal(image, np.asarray(transform(PICTURES[number])))
        np.testing.assert_array_equal(batch["label"], PICTURES.labels[batch["example"]])
        seen += list(batch["example"][batch["mask"]])
    assert seen == list(range(10))
    stream.close()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_random_crops_get_the_whole_picture(interpolation: str):
    to, names = dataclasses.replace(TO, interpolation=interpolation), ("random_resized_crop",)
    stream = make_loader(PICTURES, TrainPlan(ORDER), DEVICES, to, workers=0, augmentations=names)
    batch = host(stream.batch(0))
    assert batch["image"].shape == (BATCH, 48, 72, 3)
    for number, size, image in zip(batch["example"], batch["size"], batch["image"], strict=True):
        height, width = np.asarray(PICTURES[number]).shape[:2]
        long = min(48 * max(height, width) // min(height, width), 72)  # what is longer than the canvas is squeezed
        assert tuple(size) == (height, width, 48, long)
        laid = np.empty((48, 72, 3), np.uint8)
        onto_canvas(PICTURES[number], laid, interpolation)
        np.testing.assert_array_equal(image, laid)
    stream.close()


@pytest.mark.parametrize("partners", [False, True])
def test_a_blank_batch_has_the_shapes_of_all_others(partners: bool) -> None:
    plans = TrainPlan(ORDER, partners), EvalPlan(10, BATCH)
    made = [
        *(loader(source, plan) for source in (SMALL, PICTURES, in_memory(SMALL, Options())) for plan in plans),
        loader(PICTURES, plans[0], augmentations=("random_resized_crop",)),
        WithUnlabelled(loader(SMALL, plans[0]), loader(PICTURES, plans[0])),
    ]
    for each in made:
        shapes = [{name: (x.shape, x.dtype) for name, x in batch.items()} for batch in (each.blank(), each.batch(1))]
        assert shapes[0] == shapes[1]


def test_a_step_can_be_asked_for_at_any_time():
    stream = loader(PICTURES, TrainPlan(ORDER))
    first = [host(stream.batch(step)) for step in range(4)]
    for step in (2, 3, 0):
        again = host(stream.batch(step))
        assert all(np.array_equal(again[name], first[step][name]) for name in again)


@pytest.mark.parametrize("plan", [TrainPlan(ORDER), EvalPlan(10, BATCH)], ids=["train", "eval"])
def test_worker_processes_change_nothing(plan):
    alone, together = loader(PICTURES, plan), loader(PICTURES, plan, workers=2)
    steps = range(len(plan)) if isinstance(plan, EvalPlan) else range(5)
    for step in [*steps, *steps] if isinstance(plan, EvalPlan) else steps:  # evaluations go on with the same workers
        one, other = host(alone.batch(step)), host(together.batch(step))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    together.close()
    alone.close()


def test_each_process_reads_its_own_rows():
    read: list[int] = []

    class Noted(Pictures):
        def __getitem__(self, index: int) -> PIL.Image.Image:
            read.append(index)
            return super().__getitem__(index)

    plan, whole = TrainPlan(ORDER), loader(PICTURES, TrainPlan(ORDER)).batch(1)
    for process in range(2):
        read.clear()
        part = host(loader(Noted(PICTURES.labels), plan, share=(process, 2)).batch(1))
        rows = slice(process * 2, process * 2 + 2)
        np.testing.assert_array_equal(read, ORDER[1][rows])
        assert part["image"].shape == host(whole)["image"].shape
        np.testing.assert_array_equal(part["image"][rows], host(whole)["image"][rows])


def test_layouts():
    """The smallest that loses nothing: small images of one size as they are."""
    for size, names, kind, left in (
        ((24, 32), (), "whole", 48),
        ((48, 100), ("random_resized_crop",), "whole", 48),
        ((49, 100), (), "middle", 40),
        (None, ("flip",), "middle", 40),
        (None, ("random_resized_crop", "flip"), "canvas", 48),
    ):
        for interpolation in INTERPOLATIONS:
            to = dataclasses.replace(TO, interpolation=interpolation)
            layout, preprocessing = layout_of(dataclasses.replace(PICTURES, size=size), to, names)
            assert (layout.kind, preprocessing.resize_size) == (kind, left)
            assert layout.interpolation == preprocessing.interpolation == interpolation


def test_what_fits_is_held_in_memory():
    size = 10 * 24 * 32 * 3
    assert isinstance(in_memory(SMALL, Options(resident_mb=1)), Arrays)
    assert Options(resident_mb=1).fits(10, (24, 32))
    assert not Options(resident_mb=1).fits(2**20 // (24 * 32 * 3) + 1, (24, 32))
    assert in_memory(SMALL, Options(resident_mb=0)) is SMALL
    assert in_memory(PICTURES, Options()) is PICTURES
    assert in_memory(SMALL, Options()).images.nbytes == size  # type: ignore[attr-defined]


WORKERS = """
import sys
from pathlib import Path
from types import ModuleType
for name in ("torch", "tensorflow"):  # the parent may hold what it likes
    sys.modules[name] = ModuleType(name)
sys.path.insert(0, "tests")
from jaxsft.data.base import Options
from jaxsft.data.folder import open_folder
from jaxsft.data.loader import make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import TrainPlan
from jaxsft.run.parallel import DataParallel
from jaxsft.models.weights import Preprocessing
import pictures

source = pictures.Spy(open_folder(sys.argv[1], "train", Options(divide=False)))
loader = make_loader(source, TrainPlan(Order(6, 2, 0)), DataParallel(), Preprocessing(16, 16), workers=2)
for step in range(4):
    loader.batch(step)
print(*sorted(set(Path(sys.argv[2]).read_text().split())))
"""


def test_workers_load_neither_torch_nor_tensorflow_nor_touch_a_device(run, tmp_path: Path):
    """And the program ends by itself, with nothing on stderr, though nobody closed the loader."""
    for i in range(6):
        (tmp_path / "data/train/a").mkdir(parents=True, exist_ok=True)
        image = PIL.Image.fromarray(np.full((20 + i, 20, 3), i, np.uint8))
        image.save(tmp_path / f"data/train/a/{i}.png")
    done = run(
        "-W",
        "ignore",
        "-c",
        WORKERS,
        tmp_path / "data",
        tmp_path / "seen",
        SPY=tmp_path / "seen",
        TF_CPP_MIN_LOG_LEVEL="3",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["grain", "no-device"]
    assert "leaked" not in done.stderr
    assert "Traceback" not in done.stderr
