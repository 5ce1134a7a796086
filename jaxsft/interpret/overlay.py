"""A map laid over its picture, in colours that the colour-blind tell apart and that keep their order in grey.

What is a share, 0..1, is drawn in viridis; what speaks for a class or against it, -1..1, in orange and purple (the
ends of ColorBrewer's PuOr) over the picture in grey, the stronger the more.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import PIL.Image

OPACITY = 0.55  # of a map of shares
FOR, AGAINST = (230, 97, 1), (94, 60, 153)  # RGB
MOST = 99.0  # per cent of the pixels of a signed map that are not cut off
SHOWN = 224  # px, the least side of a picture that is saved


def overlay(image: np.ndarray, values: np.ndarray, signed: bool = False) -> np.ndarray:
    """A map over its picture: uint8 [S, S, 3].

    Args:
      image: uint8 [S, S, 3].
      values: [S, S], in 0..1, or `signed` in -1..1; beyond that it is cut off.
      signed: whether they speak for something or against it.
    """
    if not signed:
        colours = matplotlib.colormaps["viridis"](np.clip(values, 0, 1))[..., :3] * 255
        return blended(image, colours, np.float64(OPACITY))
    strength = np.clip(np.abs(values), 0, 1)[..., None]
    colours = np.where(values[..., None] > 0, FOR, AGAINST)
    grey = image @ np.array([0.299, 0.587, 0.114])  # of a television's brightness, as PIL's mode L
    pale = np.repeat(128 + grey[..., None] / 2, 3, -1)
    return blended(pale, colours, strength)


def blended(below: np.ndarray, above: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Colours over others, as whole levels."""
    return np.rint((1 - opacity) * below + opacity * above).clip(0, 255).astype(np.uint8)


def stretched(values: np.ndarray) -> np.ndarray:
    """Attributions [S, S] of any size as a signed map in -1..1: a few extreme pixels do not decide on the scale."""
    most = np.percentile(np.abs(values), MOST)
    most = most if most > 0 else np.abs(values).max()
    return np.clip(values / most, -1, 1) if most > 0 else np.zeros_like(values)


def enlarged(image: np.ndarray) -> PIL.Image.Image:
    """A picture uint8 [S, S, 3] for people: a small one as many times as large as makes it SHOWN px or more."""
    times = -(-SHOWN // len(image))
    picture = PIL.Image.fromarray(image)
    return picture.resize((picture.width * times, picture.height * times), PIL.Image.Resampling.BICUBIC)
