"""What is done before the first update where the head trains alone: features are kept, or a probe makes the head."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.data.reading import TrainPlan
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import make_schedule
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_several, make_train_step
from jaxsft.models.families import family_of
from jaxsft.models.head import Head, head_of
