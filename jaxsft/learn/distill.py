"""Distillation (Hinton et al. 2015, arXiv:1503.02531): a finished run teaches another what it makes of its images."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.data.augment import METHODS
from jaxsft.models.weights import Preprocessing


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network that is not trained, and how much its answers count beside the labels."""

    model: nn.Module
    preprocessing: Preprocessing  # of its input
    columns: tuple[int, ...]  # the teacher's output for each of the student's
    weight: float = 0.5  # its share of the loss, 0..1
    temperature: float = 2.0
    independent: bool = False  # outputs are probabilities by themselves (binary cross-entropy), not together

    def logits(self, variables: Any, images: jax.Array, of: Preprocessing | None) -> jax.Array:
        """What the teacher makes of the student's input, in the order of the student's outputs: [N, K].

        Args:
          variables: the teacher's.
          images: float32 [N, H, W, 3], the student's input, augmented, mixed and normalised.
          of: the preprocessing of these; None: they are the teacher's input as they are.
        """
        if of is not None:
            images = renormalised(images, of, self.preprocessing)
        return self.model.apply(variables, images, train=False)[:, jnp.asarray(self.columns)]

    def loss(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss of each example, [N], of logits towards the teacher's `targets`, both [N, K].

        temperature**2 * KL(teacher || student), as torch.nn.functional.kl_div of softmax(logits / temperature). Of
        independent outputs it is that of each output and its opposite, in the mean over the outputs.
        """
        t = self.temperature
        log_p, log_q = (self.log_probabilities(x / t) for x in (jax.lax.stop_gradient(targets), logits))
        terms = (jnp.exp(log_p) * (log_p - log_q)).sum(0)
        return t**2 * (terms.mean(1) if self.independent else terms.sum(1))

    def log_probabilities(self, logits: jax.Array) -> jax.Array:
        """Of each output, [1, N, K]; where they are independent of its opposite too, [2, N, K]."""
        if self.independent:
            return jax.nn.log_sigmoid(jnp.stack([logits, -logits]))
        return jax.nn.log_softmax(logits)[None]


def renormalised(images: jax.Array, there: Preprocessing, here: Preprocessing) -> jax.Array:
    """Input of a model with the preprocessing `there` as that of one with `here`: mean, deviation and crop size."""
    if (there.mean, there.std) != (here.mean, here.std):
        pixels = images * jnp.asarray(there.std) + jnp.asarray(there.mean)
        images = ((pixels - jnp.asarray(here.mean)) / jnp.asarray(here.std)).astype(images.dtype)
    size = here.crop_size
    if images.shape[1:3] != (size, size):
        shape = (images.shape[0], size, size, images.shape[3])
        images = jax.image.resize(images, shape, METHODS[here.interpolation], antialias=True)
    return images
