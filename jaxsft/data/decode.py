"""Encoded images as 8-bit RGB, and their resizing on the host: PIL's, so that the pixels are torchvision's.

simplejpeg and OpenCV decode to the same pixels in 0.8 and 0.9 of the time, and lose that again where PIL resizes their
arrays, which it copies first; of a photograph resizing takes more than half of the time, and nothing else does it so.

Runs in the loader's worker processes, which do without JAX.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from jaxsft import storage
from jaxsft.buckets import BucketPath

# What a file is tried as, whatever its ending: PIL knows sixty more, some of which start programs (EPS: Ghostscript).
# An MPO, a JPEG of several pictures, is opened as a JPEG; PIL has no other way to it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF")
# How far the kernel of an interpolation reaches to each side: steps from output to output, or px where a step is less.
REACH = {"bilinear": 1, "bicubic": 2}
LONG = 64  # times the model's input: of longer pictures, which would take gigabytes, only the middle is resized

# PIL warns of damaged EXIF, and between one and two times its limit on pixels; above that it refuses: that is enough.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(Exception):
    """An image can't be decoded; the message is the reason, without the file's name."""


class Unreachable(Unreadable):
    """The system did not give what is in the file, or no memory for it: that may be otherwise next time."""


def unreadable(error: Exception) -> Unreadable:
    """An exception of PIL's, or the system's, as what to tell of it in one line."""
    if isinstance(error, Unreadable):
        return error
    if isinstance(error, FileNotFoundError):
        return Unreachable("no such file")
    if isinstance(error, MemoryError) or getattr(error, "strerror", None):
        return Unreachable(getattr(error, "strerror", None) or "it does not fit into memory")
    if isinstance(error, PIL.UnidentifiedImageError):
        return Unreadable("not an image, or none of JPEG, PNG, WebP, BMP, PPM, TIFF and GIF")
    if isinstance(error, PIL.Image.DecompressionBombError):
        return Unreadable(str(error).split(",")[0])
    return Unreadable(" ".join(str(error).split()) or type(error).__name__)


def read_rgb(file: str | Path | BucketPath | bytes, upright: bool = True) -> PIL.Image.Image:
    """Decode a file, or its content, as an RGB image.

    Greyscale, palette and CMYK are converted, alpha is dropped (as `Image.convert("RGB")` and thus torchvision do), 16
    bits keep their upper 8. Of an animation the first frame counts.

    Args:
      file: a path, also in a bucket, or the bytes of a file.
      upright: turn the picture as its EXIF or XMP says, as `PIL.ImageOps.exif_transpose` does and every viewer;
        torchvision's ImageFolder does not. Where they can't be read the picture is taken as it lies.

    Raises:
      Unreadable: it is no image of FORMATS, is cut off, or is over PIL's limit on pixels (a decompression bomb).
      Unreachable: it can't be read.
    """
    try:
        if not isinstance(file, bytes):
            place = storage.location(file) if storage.is_remote(str(file)) else file
            file = place.read_bytes() if isinstance(place, BucketPath) else str(place)
        if not isinstance(file, bytes) and not stat.S_ISREG((status := os.stat(file)).st_mode):
            raise Unreadable("not a file")  # to open a pipe might take for ever
        if not (file if isinstance(file, bytes) else status.st_size):
            raise Unreadable("an empty file")
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            image.load()
            return turned_rgb(image, upright)
    except Exception as error:  # hostile files make PIL raise nearly anything
        raise unreadable(error) from None


def content_of(file: str) -> bytes:
    """The bytes of a file, here or in a bucket. Raises Unreachable, Unreadable."""
    try:
        place = storage.location(file) if storage.is_remote(file) else Path(file)
        if isinstance(place, Path) and not place.is_file():
            raise FileNotFoundError if not place.exists() else Unreadable("not a file")
        return place.read_bytes()
    except Exception as error:
        raise unreadable(error) from None


def turned_rgb(image: PIL.Image.Image, upright: bool = True) -> PIL.Image.Image:
    """A loaded image, which is turned itself, as `read_rgb` gives it."""
    if upright:
        with contextlib.suppress(Exception):  # and so does what strangers write into EXIF
            PIL.ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A loaded image of any mode as RGB."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip at 255 instead of scaling
        wide = np.asarray(image).astype(np.int64)
        image = PIL.Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB PIL warns about transparent palettes
    return image.convert("RGB")


def resampling(interpolation: str) -> PIL.Image.Resampling:
    """PIL's word for an interpolation of REACH."""
    return PIL.Image.Resampling[interpolation.upper()]


def middle(image: PIL.Image.Image, resize: int, crop: int, interpolation: str) -> np.ndarray:
    """torchvision's `Resize(resize, interpolation)` and `CenterCrop(crop)` of a PIL image, antialiased.

    To the last bit, bilinear and bicubic, but for pictures so long and thin that resizing them whole would take
    gigabytes: of these the strip that the middle is made of is resized alone, which may change a level by one, by two
    in bicubic interpolation. There it also counts which of its two passes PIL makes first, for it clips in between, and
    from version 13 on it chooses by the sizes: where it takes the other one for the strip, levels of noise are up to 20
    off (those of a picture with nothing to clip by two).

    Args:
      image: of any mode that PIL resizes.
      resize: px, the short side.
      crop: px, the side of the square.
      interpolation: one of REACH.

    Returns:
      [crop, crop] and, where it has several, the channels; float32 for an image of mode F, which bicubic interpolation
      may carry beyond the levels that it came with, else uint8.
    """
    width, height = image.size
    long, short = max(width, height), min(width, height)
    long_resized = resize * long // short  # rounded down
    sides = (resize, long_resized) if width <= height else (long_resized, resize)
    box: tuple[float, float, float, float] | None = None
    if long_resized > LONG * max(resize, crop):
        step = long / long_resized
        reach = REACH[interpolation] * max(step, 1)
        start = round((long_resized - crop) / 2)
        first, last = start * step, (start + crop) * step
        from_, to = max(int(first - reach) - 1, 0), min(int(last + reach) + 2, long)
        if width <= height:
            image, sides = image.crop((0, from_, width, to)), (resize, crop)
            box = (0, first - from_, width, last - from_)
        else:
            image, sides = image.crop((from_, 0, to, height)), (crop, resize)
            box = (first - from_, 0, last - from_, height)
    if image.size != sides or box is not None:
        image = image.resize(sides, resampling(interpolation), box)
    left, top = (round((side - crop) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def onto_canvas(image: PIL.Image.Image, out: np.ndarray, interpolation: str) -> np.ndarray:
    """Lay the whole picture at the upper left of `out`, a canvas of one shape for all, and blacken the rest.

    Its short side is resized to the canvas's unless it is shorter. Upright pictures lie on their side (rows and columns
    swapped); one that is longer than the canvas is squeezed along its long side, and nothing is cut off.

    Args:
      image: RGB.
      out: uint8 [short, long, 3], written to.
      interpolation: one of REACH.

    Returns:
      int32 [4]: (height, width) of the original, (rows, columns) that the picture takes on the canvas.
    """
    width, height = image.size
    rows, columns = canvas_size(height, width, (out.shape[0], out.shape[1]))
    size = (rows, columns) if height > width else (columns, rows)
    if image.size != size:
        image = image.resize(size, resampling(interpolation))
    lay(np.asarray(image), out, turned=height > width)
    return np.array([height, width, rows, columns], np.int32)


def canvas_size(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) px that a picture takes on a canvas (short, long)."""
    rows = min(canvas[0], width, height)
    return rows, min(max(rows * max(width, height) // min(width, height), rows), canvas[1])


def lay(pixels: np.ndarray, out: np.ndarray, turned: bool) -> None:
    """Copy pixels to the upper left of a canvas uint8 [short, long, 3] and blacken the rest.

    Args:
      pixels: uint8 [rows, columns, 3] or, to be `turned`, [columns, rows, 3].
      out: written to.
      turned: whether to swap.
    """
    rows, columns = pixels.shape[1::-1] if turned else pixels.shape[:2]
    if turned:
        whole(out)[:rows, :columns] = whole(pixels).T
    else:
        out[:rows, :columns] = pixels
    out[rows:] = 0
    out[:rows, columns:] = 0


def whole(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] as one item a pixel, [H, W], without a copy: rows and columns are then swapped twice as fast."""
    return pixels.view("V3")[..., 0]


def swapped(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] with rows and columns swapped, in an array of its own."""
    out = np.empty((pixels.shape[1], pixels.shape[0], 3), np.uint8)
    whole(out)[:] = whole(np.ascontiguousarray(pixels)).T
    return out
