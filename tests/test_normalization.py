"""Batch statistics of several devices, against those of all their images by NumPy in long doubles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models.normalization import PIXELS, batch_statistics
from jaxsft.models.platform import for_platform


@pytest.mark.parametrize("platform", ["cpu", "tpu"], ids=["cores", "accelerators"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_keep_their_digits_where_the_mean_is_large(platform: str, dtype: type) -> None:
    """A mean of 100, a deviation of 0.01, devices whose own means differ by half of that. Means that were rounded to
    float32 on the way cost the variance 3e-5 of itself, E[x^2] - E[x]^2 all of it."""
    random = np.random.default_rng(0)
    shift = 0.005 * np.arange(4).reshape(4, 1, 1, 1, 1)
    x = (100 + shift + 0.01 * random.standard_normal((4, 2, 14, 14, 16))).astype(dtype)
    alone = for_platform(partial(batch_statistics, axis_name="devices"), platform)
    with jax.enable_x64(True):
        means, variances = jax.vmap(alone, axis_name="devices")(jnp.asarray(x))
    whole = x.reshape(8, 14, 14, 16).astype(np.longdouble)
    step = np.finfo(dtype).eps
    for mean, variance in zip(means, variances):
        np.testing.assert_allclose(mean, whole.mean(PIXELS), rtol=step)  # the nearest numbers
        np.testing.assert_allclose(variance, whole.var(PIXELS), rtol=8 * step)  # sums of 1568 values


def test_cores_meet_once() -> None:
    """They wait for one another whenever they do."""
    alone = for_platform(partial(batch_statistics, axis_name="devices"), "cpu")
    traced = jax.make_jaxpr(alone, axis_env=[("devices", 2)])(jnp.zeros((4, 8, 8, 3)))
    assert str(traced).count("psum") == 1, traced
