"""What is on pictures: files, folders of them or images in memory, as a run's evaluation sees them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from jaxsft import cli
from jaxsft.data import decode, loose
from jaxsft.data.loader import MOST_WORKERS, BadFiles, Stream, layout_of
from jaxsft.data.loose import Loose, Picture
from jaxsft.data.reading import EvalPlan, Reader
from jaxsft.data.threads import cores
from jaxsft.learn.steps import make_probability_step
from jaxsft.models.weights import Preprocessing
from jaxsft.run.evaluation import results
from jaxsft.run.parallel import DataParallel, all_devices
from jaxsft.run.saved import Run

# Pictures that threads read: PIL decodes outside Python's lock, and two processes take as long to start as a core takes
# for 500 photographs. Of more, on many cores, threads would wait for the lock.
FEW = 1000
find_images = loose.find


def read_image(picture: Picture, to: Preprocessing, upright: bool = True) -> np.ndarray:
    """The part of an image that the model sees, uint8 [crop_size, crop_size, 3], as a run's evaluation has it.

    It is torchvision's `Resize` and `CenterCrop` of a PIL image, to the last bit (see `decode.middle`).

    Args:
      picture: a file, an image of PIL's, or uint8 [H, W, 3].
      to: what the model needs.
      upright: turn files and PIL's images as their EXIF tag says.

    Raises:
      Unreadable: it is no image, is broken or too large.
    """
    image = loose.opened(picture, upright)
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return decode.middle(image, to.resize_size, to.crop_size, to.interpolation)


def loader_of(
    run: Run, pictures: Sequence[Picture], parallel: DataParallel, batch_size: int | None, bad: BadFiles
) -> Stream:
    """The pictures in batches on the devices, as an evaluation of files has them.

    Few pictures, and those in memory, are read in threads of this process, others in worker processes. Few make a
    smaller batch.
    """
    source, devices = Loose(tuple(pictures), run.config.data.exif_orientation), len(parallel.devices)
    if batch_size is None:
        enough = devices << max(-(-len(source) // devices) - 1, 0).bit_length()
        batch_size = min(run.config.data.batch_size, enough)
        batch_size = max(batch_size // devices, 1) * devices
    layout, left = layout_of(source, run.card.preprocessing, ())
    workers = run.config.data.workers
    workers = min(cores(), MOST_WORKERS) if workers is None else workers
    few = len(source) <= FEW or not all(map(loose.is_file, source.pictures))
    reader = Reader(source, EvalPlan(len(source), batch_size, again=False), layout, parallel.share)
    return Stream(reader, parallel, left, workers, bad, in_threads=few)


class Program(NamedTuple):
    """What predicts for a run, ready for the next pictures."""

    parallel: DataParallel
    step: Callable[..., Any]
    variables: Any  # on all devices


PROGRAMS: weakref.WeakKeyDictionary[Run, Program] = weakref.WeakKeyDictionary()  # for as long as their runs are there


def program_of(run: Run) -> Program:
    """The compiled step of a run; a second call to predict, as in a notebook, finds it made."""
    if run not in PROGRAMS:
        parallel, card = all_devices(run.config), run.card
        _, left = layout_of(Loose(()), card.preprocessing, ())
        body = make_probability_step(run.model, left, card.multi_label, card.temperature)
        PROGRAMS[run] = Program(parallel, parallel.compile(body, rows=True), parallel.replicate(run.variables))
    return PROGRAMS[run]


def predict(
    run: Run,
    pictures: Sequence[Picture],
    topk: int,
    *,
    batch_size: int | None = None,
    bad: BadFiles | None = None,
    done: Callable[[int], Any] = lambda count: None,
) -> Iterator[dict[str, Any]]:
    """{"file", "classes": [{"class", "probability"}, ...]} of each readable picture, the most probable first.

    Of a model of several labels an image each class has a probability of its own, and "labels" names all above 0.5.
    The probabilities are those of `evaluate` on the same pictures: one program whatever their sizes, on all devices.

    Args:
      run: whose model, card and config.
      pictures: files and images in memory; one of these is called by its place, such as 'image 3'.
      topk: classes a picture.
      batch_size: over all devices; None: the run's, or as many as few pictures need.
      bad: where those are noted that can't be read; None: they are named on stderr.
      done: is told of each batch how many pictures of it are done, those that can't be read too.

    Raises:
      UserError: the network computes no numbers, or the batch does not split over the devices.
    """
    program = program_of(run)
    if batch_size is not None:
        program.parallel.check_batch(batch_size, what="--batch-size")
    loader = loader_of(run, pictures, program.parallel, batch_size, BadFiles("skip") if bad is None else bad)
    names, source = run.card.names, loader.reader.source
    left = len(source)
    try:
        for batch in results(program.step, program.variables, loader):
            rows, numbers = (batch[name][batch["mask"]] for name in ("probability", "example"))
            if not np.isfinite(rows).all():
                raise cli.UserError(f"the network of step {run.step} computes no numbers", "take another --checkpoint")
            for number, row in zip(numbers, rows, strict=True):
                best = np.argsort(-row, kind="stable")[:topk]
                found = {"file": source.name(number), "classes": [entry(names, row, i) for i in best]}
                if run.card.multi_label:
                    found["labels"] = [names[i] for i in np.flatnonzero(row > 0.5)]
                yield found
            count = min(left, len(batch["mask"]))
            left -= count
            done(count)
    finally:
        loader.close()


def entry(names: Sequence[str], row: np.ndarray, number: int) -> dict[str, Any]:
    """A class and its probability."""
    return {"class": names[number], "probability": float(row[number])}
