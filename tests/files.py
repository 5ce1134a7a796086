"""Pictures in files, for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, seed: int = 0, size: tuple[int, int] = (20, 30), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(picture(*size, seed)).save(path, **options)
    return path
