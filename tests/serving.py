"""A small service for the tests: a network of one block that nobody trained, and pictures of many kinds."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from jaxsft import config as config_module
from jaxsft import interface
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import init_variables
from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.ship import listener, server
from jaxsft.ship.limits import Limits
from jaxsft.ship.predictor import Predictor
from tests import small

SIZE, LIMITS = 32, Limits(max_batch=2, max_wait=0.0, max_bytes=1_000_000, max_pixels=4_000_000, timeout=30, topk=3)
NAMES = ("<b>bold</b>", "cat", "dog\x1b[31m", "é\u202e")
CARD = ModelCard(small.ARCH, len(NAMES), NAMES, preprocessing=Preprocessing(SIZE + 4, SIZE))
RAW = {"Content-Type": "application/octet-stream"}


def untrained() -> interface.Run:
    """A run, of a checkpoint that is nowhere, whose probabilities differ."""
    model = ARCHITECTURES[small.ARCH](num_classes=len(NAMES))
    variables = init_variables(model, 0, SIZE)
    head = variables["params"]["fc"]
    head["kernel"], head["bias"] = 20 * head["kernel"], np.array([3, -3, 1, -1], np.float32)
    return interface.Run(Path(), config_module.default(), CARD, model, variables, 7)


def predictor_of(run: interface.Run, card: ModelCard = CARD) -> Predictor:
    """What answers for a run; not yet open."""
    return Predictor(run.model, run.variables, card, LIMITS, step=7)


@contextlib.contextmanager
def on_socket(predictor: Predictor) -> Iterator[tuple[tuple[str, int], Any]]:
    """A service in a thread: its address and its application. It ends as after SIGTERM."""
    application = server.app(predictor)
    serving = listener.make_server(application, predictor.limits, application.state.house.end)
    with listener.bind("127.0.0.1", 0, predictor.limits.timeout) as listening:
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname(), application
        finally:
            serving.handle_exit(15, None)
            thread.join(60)
            assert not thread.is_alive()


def picture(width: int = 60, height: int = 40, kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    """The bytes of a file of noise."""
    levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(levels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def turned() -> bytes:
    """A JPEG that lies on its side, and says so."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return picture(60, 40, exif=exif)


PICTURES = {
    "jpeg": picture(),
    "small": picture(9, 5, "PNG"),
    "thin": picture(300, 3, "PNG"),
    "turned": turned(),
    "large": picture(700, 500),
    "palette": picture(50, 50, "GIF", "P"),
    "grey": picture(50, 70, "PNG", "L"),
    "alpha": picture(40, 40, "WEBP", "RGBA"),
    "cmyk": picture(40, 50, "TIFF", "CMYK"),
    "ppm": picture(33, 44, "PPM"),
}
