"""The mean of a model's random sub-models at test (arXiv:2306.01705)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context
from ar_jax.sampling.likelihood import teacher_forced


def ensemble_log_prob(model: Autoregressive, params: Any, values: Array, context: Context, keys: Array) -> Array:
    """log of the mean, over sub-models, of p(token | what came before), summed over the tokens, [B] nats.

    Args:
      model: with dropout, or mixers that draw what they read.
      params: its parameters.
      values: [B, L] int32.
      context: order and condition of each example.
      keys: [E], a sub-model each.
    """

    def of_one(key: Array) -> Array:
        hidden, target = teacher_forced(model, model.feed.parallel(), params, values, context, key)
        return model.ask(params, "log_prob", hidden, target)

    each = jax.lax.map(of_one, keys)
    return (jax.nn.logsumexp(each, axis=0) - jnp.log(len(keys))).reshape(len(values), -1).sum(axis=1)
