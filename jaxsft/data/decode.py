"""Encoded images as 8-bit RGB, and their resizing on the host: PIL's, so that the pixels are torchvision's.

Runs in the loader's worker processes: imports neither JAX nor the rest of the package.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

ORIENTATION = 0x0112  # EXIF tag
TURNED = (5, 6, 7, 8)  # its values that swap height and width

# Between one and two times its limit on pixels PIL warns, above that it refuses: one answer is enough.
warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)


class Unreadable(Exception):
    """An image can't be decoded; the message is the reason, without the file's name."""


def reason(error: Exception) -> str:
    """What to tell of an exception of PIL's, in one line."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return str(error).split(",")[0]
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text or type(error).__name__


def read_rgb(file: str | Path | bytes, upright: bool = True) -> PIL.Image.Image:
    """Decode a file, or its content, as an RGB image.

    Greyscale, palette and CMYK are converted, alpha is dropped (as `Image.convert("RGB")` and thus torchvision do), 16
    bits keep their upper 8. Of an animation the first frame counts.

    Args:
      file: a path or the bytes of a file.
      upright: turn the picture as its EXIF orientation says, as `PIL.ImageOps.exif_transpose` does and every viewer;
        torchvision's ImageFolder does not.

    Raises:
      Unreadable: it can't be read, is no image, is cut off, or is over PIL's limit on pixels (a decompression bomb).
    """
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            if upright and (image.info.keys() & {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}):
                return to_rgb(PIL.ImageOps.exif_transpose(image))
            return to_rgb(image)
    except Exception as error:  # on hostile files PIL raises nearly anything
        raise Unreadable(reason(error)) from None


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


def read_size(file: str | Path, upright: bool = True) -> tuple[int, int]:
    """(height, width) of the decoded image in px, from the file's header alone.

    Raises:
      Unreadable: as `read_rgb`, as far as the header shows it.
    """
    try:
        with PIL.Image.open(file) as image:
            turned = upright and "exif" in image.info and image.getexif().get(ORIENTATION) in TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:
        raise Unreadable(reason(error)) from None


def resized(image: PIL.Image.Image, short: int) -> PIL.Image.Image:
    """torchvision's `Resize(short)` of a PIL image: bilinear, antialiased, the long side rounded down."""
    width, height = image.size
    if min(width, height) == short:
        return image
    size = (short, short * height // width) if width <= height else (short * width // height, short)
    return image.resize(size, PIL.Image.Resampling.BILINEAR)


def middle(image: PIL.Image.Image, resize: int, crop: int) -> np.ndarray:
    """torchvision's `Resize(resize)` and `CenterCrop(crop)` on a PIL image: uint8 [crop, crop, 3]."""
    image = resized(image, resize)
    left, top = (round((side - crop) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def onto_canvas(image: PIL.Image.Image, out: np.ndarray) -> np.ndarray:
    """Lay the whole picture at the upper left of `out`, a canvas of one shape for all, and blacken the rest.

    Its short side is resized to the canvas's unless it is shorter. Upright pictures lie on their side (rows and columns
    swapped); one that is longer than the canvas is squeezed along its long side, and nothing is cut off.

    Args:
      image: RGB.
      out: uint8 [short, long, 3], written to.

    Returns:
      int32 [4]: (height, width) of the original, (rows, columns) that the picture takes on the canvas.
    """
    width, height = image.size
    rows = min(out.shape[0], width, height)
    columns = min(max(rows * max(width, height) // min(width, height), rows), out.shape[1])
    size = (rows, columns) if height > width else (columns, rows)
    if image.size != size:
        image = image.resize(size, PIL.Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    out[:rows, :columns] = pixels.swapaxes(0, 1) if height > width else pixels
    out[rows:] = 0
    out[:rows, columns:] = 0
    return np.array([height, width, rows, columns], np.int32)
