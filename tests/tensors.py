"""Pictures as arrays [H, W, 3], and as torch's tensors [3, H, W]."""

from __future__ import annotations

import numpy as np
import torch


def picture(height: int = 37, width: int = 53, seed: int = 0) -> np.ndarray:
    """A smooth picture with some noise, uint8 [H, W, 3]: histograms and gradients like a photograph's."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.uniform(0, 255, (1, 3, 5, 6)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].numpy().transpose(1, 2, 0)
    return (smooth + random.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8)


def to_torch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def from_torch(image: torch.Tensor) -> np.ndarray:
    return image.numpy().transpose(1, 2, 0)
