"""Several views of each image, for test-time augmentation: its mirror image, and crops of its corners."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxsft.cli import UserError
from jaxsft.models.weights import Preprocessing

FLIP, CROPS = "flip", "crops"


@dataclasses.dataclass(frozen=True)
class Views:
    """Which views of an image are taken: `flip`, its mirror image too; `crops`, its corners and its middle."""

    flip: bool
    crops: bool

    @classmethod
    def of(cls, text: str, to: Preprocessing) -> Views | None:
        """From 'flip', 'crops' or 'flip+crops'; None where '' asks for none.

        Raises:
          UserError: it is none of them, or the model sees all of an image, so that there are no crops to take.
        """
        if not text:
            return None
        names = text.split("+")
        if not set(names) <= {FLIP, CROPS} or len(set(names)) < len(names):
            raise UserError(f"--tta is {text!r}", f"it must be {FLIP}, {CROPS} or {FLIP}+{CROPS}")
        if CROPS in names and to.resize_size <= to.crop_size:
            sizes = f"images are resized to {to.resize_size} px, and the model sees {to.crop_size} px of them"
            raise UserError(f"--tta {text} has no crops to take: {sizes}", f"take --tta {FLIP}")
        return cls(FLIP in names, CROPS in names)

    def __len__(self) -> int:
        return (5 if self.crops else 1) * (2 if self.flip else 1)

    def prepared(self, to: Preprocessing) -> Preprocessing:
        """How images are to be prepared for `one`: where crops are taken, to the middle square of what is resized.

        So it is for a source of one image size and for a streamed one, which sends that square and no more.
        """
        return dataclasses.replace(to, crop_size=to.resize_size) if self.crops else to

    def one(self, images: jax.Array, size: int, number: jax.Array) -> jax.Array:
        """View `number`, int32 from 0, of images [N, S, S, 3]: [N, size, size, 3].

        Of crops they are those of torchvision's FiveCrop, in its order: upper left, upper right, lower left, lower
        right, middle; with `flip` those of TenCrop, the same of the mirror image after them. One at a time, for all at
        once would take ten times the memory.
        """
        each = len(self) // 2 if self.flip else len(self)
        x = jnp.where(number >= each, images[:, :, ::-1], images) if self.flip else images
        if not self.crops:
            return x
        far = images.shape[1] - size
        middle = round(far / 2)  # half rounds to even, as in torchvision's center_crop
        top, left = jnp.asarray(((0, 0), (0, far), (far, 0), (far, far), (middle, middle)), jnp.int32)[number % each]
        return lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(x, top, size, 1), left, size, 2)
