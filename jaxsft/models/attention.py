"""What the transformers are built of: attention and the layers after it.

Vaswani et al. 2017 (arXiv:1706.03762).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.models.blocks import gelu
from jaxsft.models.layers import Initializer, Linear
from jaxsft.models.stochastic import Dropout, Keys


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T + bias) v, head by head, for q, k and v [..., T, heads, C]: [..., T, heads, C] of v's dtype.

    `bias` is broadcast to [..., heads, T, T]. Logits and softmax are float32 at least; jax.nn.dot_product_attention
    takes the softmax in float32 of float64 too.
    """
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    # Said as transposes: left to the products, XLA:CPU took 95 ms for 8 images of ViT-B/16 instead of 45.
    q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    logits = jnp.einsum("...qc,...kc->...qk", q, k, preferred_element_type=dtype)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    return jnp.einsum("...qk,...kc->...qc", nn.softmax(logits).astype(v.dtype), v).swapaxes(-3, -2)


class MLP(nn.Module):
    """`torchvision.ops.MLP` with one hidden layer: modules "0" and "3" are linear, "2" and "4" dropout.

    Takes and returns [..., C]; the activation between is the exact GELU.
    """

    hidden: int
    kernel_init: Initializer
    bias_init: Initializer = nn.initializers.zeros
    dropout: float = 0.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys) -> jax.Array:
        channels = x.shape[-1]
        y = gelu(Linear(self.hidden, self.kernel_init, self.bias_init, param_dtype=self.param_dtype, name="0")(x))
        y = Dropout(self.dropout, name="2")(y, keys)
        y = Linear(channels, self.kernel_init, self.bias_init, param_dtype=self.param_dtype, name="3")(y)
        return Dropout(self.dropout, name="4")(y, keys)
