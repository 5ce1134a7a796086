"""FixMatch (Sohn et al. 2020, arXiv:2001.07685): labels for unlabelled images, where the network is sure of them.

Each unlabelled image is augmented twice, weakly, as the labelled ones are, and strongly. What the network takes the
weak view for, where it is sure, is the label of the strong one.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxsft.data.augment import ERASING
from jaxsft.learn.losses import cross_entropy

STRONG = "rand_augment"


@dataclasses.dataclass(frozen=True)
class FixMatch:
    """How sure the network must be, and how much such labels count."""

    threshold: float = 0.95  # of the largest probability
    weight: float = 1.0  # lambda_u

    def loss(self, weak: jax.Array, strong: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss of each unlabelled image, [N], and whether its label counts, bool [N], of both views' logits [N, K].

        Cross-entropy of the strong view with the class that the weak view is taken for, 0 where that has less than
        the threshold. The weak view has no gradient.
        """
        probabilities = jax.nn.softmax(jax.lax.stop_gradient(weak))
        is_sure = probabilities.max(1) >= self.threshold
        losses = cross_entropy(strong, probabilities.argmax(1).astype(jnp.int32))
        return jnp.where(is_sure, losses, 0), is_sure


def strong(weak: tuple[str, ...]) -> tuple[str, ...]:
    """The augmentations of the strong view: those of the weak one, RandAugment, and erasing in the place of Cutout."""
    return (*(name for name in weak if name not in (STRONG, ERASING)), STRONG, ERASING)
