"""What a source of labelled images is, and the settings that it is opened with."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import PIL.Image

from jaxsft.storage import location

if TYPE_CHECKING:
    from jaxsft.data.records import Record

Image = PIL.Image.Image | np.ndarray  # RGB, or uint8 [H, W, 3]
LONG = 8  # times the short side: longer images are cut on the host, not resized whole on the device


@dataclasses.dataclass(frozen=True)
class Options:
    """How sources are opened, as `config.data` says."""

    data_dir: str = ""  # of TFDS
    eval_fraction: float = 0.1  # of every class, where the data has no split of its own
    seed: int = 0  # of that split
    on_error: str = "raise"  # 'raise' | 'skip'
    upright: bool = True  # turn pictures as their EXIF orientation says
    resident_mb: int = 1024  # sets of one image size up to this are held as an array
    class_order: str = "text"  # 'text', torchvision's | 'numeric'
    labelled: bool = True  # False: pictures may lie in a folder without folders of classes
    divide: bool = True  # data without splits is divided into 'train' and 'val'; else it is one split, 'all'
    label_delimiter: str = ""  # between the labels of an image with several, in a table; '': it has one

    def __post_init__(self) -> None:
        """Expand `~` in `data_dir`.

        Raises:
          UserError: `data_dir` is an address of a kind that is not known.
        """
        if self.data_dir:
            object.__setattr__(self, "data_dir", str(location(self.data_dir)))

    @classmethod
    def of(cls, config: Any) -> Options:
        """From a run's config."""
        data = config.data
        return cls(
            data.data_dir,
            data.eval_fraction,
            config.seed,
            data.on_error,
            data.exif_orientation,
            data.resident_mb,
            data.class_order,
            label_delimiter=data.label_delimiter,
        )

    def fits(self, count: int, size: tuple[int, int]) -> bool:
        """Whether `count` images of `size` (height, width) may be held as one array: not too many, nor thin ones."""
        return max(size) <= LONG * min(size) and count * size[0] * size[1] * 3 <= self.resident_mb * 2**20


class Shrunk(NamedTuple):
    """What was done to pictures when they were packed: the short side of larger ones is `size` px by now."""

    size: int
    interpolation: str  # that they were resized by, one of decode.REACH


class Source(abc.ABC):
    """Labelled images by number: a length, items, names of the classes.

    A subclass sets `class_names` and `labels` and defines `__getitem__`; it is pickled to the worker processes.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray  # int32 [N]; of images with any number of labels uint8 [N, K], 1 where one has the label, else 0
    size: tuple[int, int] | None = None  # (height, width) in px where all images have one, else None
    bad: tuple[tuple[str, str], ...] = ()  # (file, reason) of what was left out
    split: str = ""  # what it is a part of, as the data calls it: "val", "train+test"
    listing: str = ""  # sha256 of the list of names and labels before anything was left out; '': it has no list
    splits: tuple[str, ...] = ()  # all that the data has, as it calls them; (): that is not known
    scattered = False  # whether numbers in slices count in the fixed random order of `splits.shuffled(_, 0, 0)`
    shrunk: Shrunk | None = None  # where images were resized before
    version: str = ""  # beside the names, what changes with the pixels: times of files, how they are turned

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of labels, not one."""
        return np.ndim(self.labels) == 2

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Image:
        """Image `index`.

        Raises:
          decode.Unreadable: it is broken.
        """

    @abc.abstractmethod
    def select(self, indices: np.ndarray) -> Source:
        """The source of these images, in this order."""

    def relabelled(self, labels: np.ndarray, class_names: Sequence[str]) -> Source:
        """The same images with other numbers of classes."""
        return changed(self, labels=labels, class_names=tuple(class_names))

    def picture(self, index: int) -> Image | Record:
        """Image `index` as it is at hand, perhaps on its side. Raises as the image itself."""
        return self[index]

    def encoded(self, index: int) -> bytes | None:
        """The file that image `index` is decoded from, as it is; None where there is none. Raises as the image."""
        return None

    def name(self, index: int) -> str:
        """What to call an image in messages: its file, where it has one."""
        return f"image {index}"


AnySource = TypeVar("AnySource", bound=Source)


def changed(source: AnySource, **attributes: Any) -> AnySource:
    """A copy of any source, one of a config file too, with other attributes."""
    other = copy.copy(source)
    for name, value in attributes.items():
        object.__setattr__(other, name, value)
    return other


@dataclasses.dataclass(frozen=True)
class Arrays(Source):
    """Images of one size in memory: images uint8 [N, H, W, 3], labels as `Source` has them."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    bad: tuple[tuple[str, str], ...] = ()
    split: str = ""
    listing: str = ""
    names: tuple[str, ...] = ()  # what `name` gives; (): they have none
    shrunk: Shrunk | None = None

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return self.images.shape[1], self.images.shape[2]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def select(self, indices: np.ndarray) -> Arrays:
        names = tuple(self.names[i] for i in indices) if self.names else ()
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices], names=names)

    def name(self, index: int) -> str:
        return self.names[index] if self.names else super().name(index)


@dataclasses.dataclass(frozen=True)
class Part(Source):
    """Some images of an array, which is held whole, once, however many parts of it are used; rows int32 [n]."""

    whole: Arrays
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        return self.whole.labels[self.rows]

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.whole.class_names

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return self.whole.size

    @property
    def bad(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return self.whole.bad

    @property
    def split(self) -> str:  # type: ignore[override]
        return self.whole.split

    @property
    def listing(self) -> str:  # type: ignore[override]
        return self.whole.listing

    @property
    def shrunk(self) -> Shrunk | None:  # type: ignore[override]
        return self.whole.shrunk

    def __getitem__(self, index: int) -> np.ndarray:
        return self.whole[self.rows[index]]

    def select(self, indices: np.ndarray) -> Part:
        return Part(self.whole, self.rows[indices])

    def name(self, index: int) -> str:
        return self.whole.name(int(self.rows[index]))
