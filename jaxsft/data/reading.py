"""From the numbers of examples to arrays of one shape, in the loader's worker processes; and whole sets into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

from jaxsft.data import decode
from jaxsft.data.base import Arrays, Image, Options, Source
from jaxsft.data.cache import Cache
from jaxsft.data.order import Order
from jaxsft.data.records import Record, from_bytes
from jaxsft.data.threads import in_order
from jaxsft.progress import progress

Numbers = dict[str, np.ndarray]
LONGEST = 1.5  # of a canvas: long side / short side, that of most photographs; longer pictures are squeezed
SUBSTITUTES = 1000  # broken images in a row before something else must be wrong


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """Which examples step t (from 0) trains on: "example" int32 [B] and, for mixing, "partner" int32 [B].

    An example's partner is its neighbour in the global batch, as in torchvision's mixup and cutmix: a function of the
    order alone.
    """

    order: Order
    partners: bool = False

    def __len__(self) -> int:
        return sys.maxsize  # as many as are asked for

    @property
    def every(self) -> int:
        """Steps of a pass over the images."""
        return self.order.steps_per_epoch

    def __getitem__(self, step: int) -> Numbers:
        example = self.order[step]
        return {"example": example, "partner": np.roll(example, 1)} if self.partners else {"example": example}


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """Every example once, in order: "example" int32 [B] and "mask" bool [B], False where the last batch is padded."""

    size: int
    batch_size: int
    again: bool = True  # whether the set is evaluated once more, and its first batches are made ready for that

    def __len__(self) -> int:
        return (self.size + self.batch_size - 1) // self.batch_size

    @property
    def every(self) -> int:
        """Steps of a pass over the images."""
        return len(self)

    def __getitem__(self, step: int) -> Numbers:
        index = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int32)
        return {"example": np.minimum(index, self.size - 1), "mask": index < self.size}


@dataclasses.dataclass(frozen=True)
class PartPlan:
    """The plan of a part of a set, by the numbers that its examples have in the whole: rows int32 [n]."""

    plan: Plan
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def every(self) -> int:
        """Steps of a pass over the images."""
        return self.plan.every

    def __getitem__(self, step: int) -> Numbers:
        return {name: value if name == "mask" else self.rows[value] for name, value in self.plan[step].items()}


Plan = TrainPlan | EvalPlan | PartPlan


@dataclasses.dataclass(frozen=True)
class Layout:
    """How decoded images become arrays of one shape.

    kind: 'whole', as they are (all have one size); 'middle', resized and their middle cut out, the model's input but
    for the normalising; 'canvas', resized whole, for random crops on the device.
    """

    kind: str
    shape: tuple[int, int]  # of an image in the batch, (height, width) px
    resize: int  # px, the short side
    interpolation: str = "bilinear"  # one of decode.REACH; 'whole' resizes nothing

    def put(self, image: Image | Record, out: np.ndarray) -> np.ndarray | None:
        """Write an image to `out`, uint8 [*shape, 3]; its size on a canvas (see `decode.onto_canvas`), else None.

        Raises:
          decode.Unreadable: it has not the size that all are said to have: its file has changed since it was looked at.
        """
        if isinstance(image, Record):
            return self.put_record(image, out)
        if self.kind == "whole":
            pixels = np.asarray(image)
            if pixels.shape != out.shape:
                (height, width), (rows, columns) = pixels.shape[:2], self.shape
                raise decode.Unreadable(f"is {width} x {height} px, not {columns} x {rows} px as when it was indexed")
            out[:] = pixels
            return None
        if isinstance(image, np.ndarray):
            image = PIL.Image.fromarray(image)
        if self.kind == "middle":
            out[:] = decode.middle(image, self.resize, self.shape[0], self.interpolation)
            return None
        return decode.onto_canvas(image, out, self.interpolation)

    def put_record(self, record: Record, out: np.ndarray) -> np.ndarray | None:
        """`put` of a picture that was decoded before: copied where it has the size wanted, else resized from that."""
        rows, columns = record.pixels.shape[:2]
        if self.kind == "middle" and rows == self.resize and columns <= decode.LONG * max(self.resize, *self.shape):
            top, left = (round((side - self.shape[0]) / 2) for side in (rows, columns))
            block = record.pixels[top : top + self.shape[0], left : left + self.shape[1]]
            decode.lay(block, out, record.turned)
            return None
        if self.kind == "canvas":
            size = decode.canvas_size(*record.original, self.shape)
            if size == (rows, columns):
                decode.lay(record.pixels, out, turned=False)
            else:
                decode.onto_canvas(PIL.Image.fromarray(record.image()), out, self.interpolation)
            return np.array([*record.original, *size], np.int32)
        return self.put(record.image(), out)

    def record_of(self, out: np.ndarray, size: np.ndarray | None) -> Record:
        """What `put` wrote to `out`, and returned, for `restore`."""
        if size is None:
            return Record(out, False, self.shape)
        height, width, rows, columns = size.tolist()
        return Record(out[:rows, :columns], height > width, (height, width))

    def restore(self, record: Record, out: np.ndarray) -> np.ndarray | None:
        """Write what `put` wrote, and return what it returned.

        Raises:
          decode.Unreadable: it was another layout's.
        """
        is_canvas = self.kind == "canvas"
        size = decode.canvas_size(*record.original, self.shape) if is_canvas else self.shape
        if record.pixels.shape[:2] != size:
            raise decode.Unreadable("its record is of another size")
        decode.lay(record.pixels, out, turned=False)
        return np.array([*record.original, *size], np.int32) if is_canvas else None


@dataclasses.dataclass(frozen=True)
class Reader:
    """The batch of a step with its pixels; called in a worker process.

    `share` is (this process, number of processes): of every batch it reads its rows alone. `empty` makes the arrays of
    pixels, as `np.empty` does. `cache` has what was laid out before.
    """

    source: Source
    plan: Plan
    layout: Layout
    share: tuple[int, int] = (0, 1)
    empty: Callable[[tuple[int, ...], type], np.ndarray] = np.empty
    cache: Cache | None = None

    def __call__(self, step: int) -> dict[str, Any]:
        """The arrays of `plan[step]` with "image", "label" (and "size"), the same of the partners, and "bad".

        In place of a broken image training gets the next readable one; evaluation has a False mask there. "bad" holds
        pairs (number of the image, reason). After the last step there is nothing. Where there is something to warn of,
        "said" holds it.
        """
        if step >= len(self.plan):
            return {"bad": []}
        if self.cache:
            self.cache.at(step, self.plan.every)
        numbers = {name: self.own_rows(value) for name, value in self.plan[step].items()}
        example, mask = numbers["example"], numbers.get("mask")
        roles = {"": example, "partner_": numbers["partner"]} if "partner" in numbers else {"": example}
        slots = {int(number): slot for slot, number in enumerate(dict.fromkeys(np.concatenate([*roles.values()])))}
        images = self.empty((len(slots), *self.layout.shape, 3), np.uint8)
        bad: dict[int, str] = {}
        read = [self.read(number, images[slot], bad, mask is None) for number, slot in slots.items()]
        batch: dict[str, Any] = {}
        for prefix, wanted in roles.items():
            rows = np.array([slots[int(number)] for number in wanted])
            taken = np.array([read[row][0] for row in rows], np.int32)
            batch[(prefix or "example_")[:-1]] = taken
            batch[prefix + "label"] = self.source.labels[taken]
            batch[prefix + "image"] = images if len(slots) == len(rows) and not prefix else self.copied(images, rows)
            if self.layout.kind == "canvas":
                batch[prefix + "size"] = np.stack([np.asarray(read[row][1]) for row in rows])
        if mask is not None:
            batch["mask"] = mask & np.array([int(number) not in bad for number in example])
        said = self.cache.said() if self.cache else []
        return {**batch, "bad": list(bad.items()), **({"said": said} if said else {})}

    def copied(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """`images[rows]`."""
        out = self.empty((len(rows), *images.shape[1:]), np.uint8)
        return np.take(images, rows, 0, out, mode="clip")  # 'raise' would make a copy more

    def blank(self) -> Numbers:
        """What a call gives of the first step, without "bad" and with black images: it reads none."""
        batch = {name: self.own_rows(value) for name, value in self.plan[0].items()}
        for prefix, role in (("", "example"), ("partner_", "partner")):
            if role in batch:
                count = len(batch[role])
                batch[prefix + "label"] = self.source.labels[batch[role]]
                batch[prefix + "image"] = np.zeros((count, *self.layout.shape, 3), np.uint8)
                if self.layout.kind == "canvas":
                    batch[prefix + "size"] = np.ones((count, 4), np.int32)
        return batch

    def own_rows(self, values: np.ndarray) -> np.ndarray:
        """This process's part of an array [B, ...]."""
        process, processes = self.share
        each = len(values) // processes
        return values[process * each : (process + 1) * each]

    def read(
        self, number: int, out: np.ndarray, bad: dict[int, str], substitute: bool
    ) -> tuple[int, np.ndarray | None]:
        """Read an image to `out`; its number, its substitute's where it is broken, and what `Layout.put` says."""
        for offset in range(min(len(self.source), SUBSTITUTES)):
            candidate = (number + offset) % len(self.source)
            try:
                return candidate, self.laid_out(candidate, out)
            except decode.Unreadable as error:
                bad[candidate] = str(error)
                if not substitute:
                    out[:] = 0
                    return number, np.array([*self.layout.shape, *self.layout.shape], np.int32)
        raise RuntimeError(f"no readable image after {self.source.name(number)}: {bad[number]}")

    def laid_out(self, number: int, out: np.ndarray) -> np.ndarray | None:
        """`Layout.put` of an image, or the same from the cache. Raises decode.Unreadable."""
        kept = self.cache.get(number) if self.cache else None
        if kept is not None:
            with contextlib.suppress(decode.Unreadable):
                return self.layout.restore(from_bytes(kept), out)
        size = self.layout.put(self.source.picture(number), out)
        if self.cache:
            self.cache.put(number, self.layout.record_of(out, size).to_bytes())
        return size


def in_memory(source: Source, options: Options) -> Source:
    """`source` as one array where its images have one size and fit `options.resident_mb`; else itself.

    Broken images are left out of it and listed in its `bad`.
    """
    if isinstance(source, Arrays) or source.size is None or not options.fits(len(source), source.size):
        return source
    layout = Layout("whole", source.size, min(source.size))
    images = np.empty((len(source), *source.size, 3), np.uint8)
    bad: dict[int, str] = {}

    def fill(number: int) -> None:
        try:
            layout.put(source[number], images[number])
        except decode.Unreadable as error:
            bad[number] = str(error)

    done = in_order(fill, range(len(source)))
    for _ in progress(done, desc="decoding", total=len(source), unit="image"):
        pass
    named = tuple((source.name(number), reason) for number, reason in sorted(bad.items()))
    bads = source.bad + named
    names = tuple(map(source.name, range(len(source))))
    arrays = Arrays(images, source.labels, source.class_names, bads, source.split, source.listing, names, source.shrunk)
    return arrays.select(np.setdiff1d(np.arange(len(source)), list(bad))) if bad else arrays
