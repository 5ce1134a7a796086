"""A picture that came as bytes, as the model sees it: what evaluation makes of a file, under a limit on its pixels."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

from jaxsft.data import decode
from jaxsft.models.weights import Preprocessing


class TooLarge(Exception):
    """A picture has too many pixels; the message says how many, and how many it may have."""


def read(content: bytes, to: Preprocessing, upright: bool, max_pixels: int) -> np.ndarray:
    """The part of a picture that the model sees, uint8 [crop_size, crop_size, 3], as a run's evaluation has it.

    A file of a few bytes may claim to be as large as it
    likes (a decompression bomb), so the size that its header says counts, before anything is decoded.

    Args:
      content: of a file of one of `decode.FORMATS`.
      to: what the model needs.
      upright: turn it as its EXIF tag says.
      max_pixels: width times height.

    Raises:
      Unreadable: it is no picture, or a broken one.
      TooLarge: it has more pixels.
    """
    check_pixels(content, max_pixels)
    return decode.middle(decode.read_rgb(content, upright), to.resize_size, to.crop_size, to.interpolation)


def check_pixels(content: bytes, most: int) -> None:
    """Raise TooLarge or Unreadable by what the header of a file says."""
    if not content:
        raise decode.Unreadable("an empty file")
    try:
        with PIL.Image.open(io.BytesIO(content), formats=decode.FORMATS) as image:
            width, height = image.size
    except PIL.Image.DecompressionBombError:
        raise TooLarge(f"the picture has more than {2 * (PIL.Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    except Exception as error:  # hostile files make PIL raise nearly anything
        raise decode.unreadable(error) from None
    if width * height > most:
        raise TooLarge(f"the picture has {width:,} x {height:,} pixels, more than {most:,}")
