"""Exact log-likelihoods: the same network, fed the data instead of its own draws."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.feeds.protocol import Chunk
from ar_jax.mixers.protocol import take
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context, Generator
from ar_jax.sampling.loop import Params, walk


def log_prob(model: Autoregressive, params: Params, values: Array, context: Context) -> Array:
    """log p(values | order, condition) in nats, per example.

    One network evaluation if the feed has a parallel form, else one per step.

    Args:
      model: network, order and feed.
      params: the network's parameters.
      values: [B, L] int32 or [B, L, C] float, on their slots.
      context: the order of each example, and its condition.

    Returns:
      [B] float32.
    """
    generator, feed = model.generator, model.feed
    if feed.remembers:
        hidden, target = teacher_forced(generator, feed.parallel(), params, values, context)
        return generator.apply(params, hidden, target, method="log_prob").sum(axis=1)

    def body(total: Array, step: Array, chunk: Chunk, asked: np.ndarray) -> Array:
        hidden, _ = generator.apply(params, values, context, chunk)
        target = take(values, context.slots[:, chunk.target[asked]])
        return total + generator.apply(params, hidden[:, asked], target, method="log_prob").sum(axis=1)

    return walk(feed, body, jnp.zeros(len(values), jnp.float32))


def teacher_forced(
    generator: Generator, chunk: Chunk, params: Params, values: Array, context: Context, dropout_key: Array | None = None
) -> tuple[Array, Array]:
    """All of a chunk's answers: hidden vectors [B, n, D] and the tokens that they should predict, [B, n, ...].

    Args:
      generator: the model.
      chunk: with targets known while tracing.
      params: its parameters.
      values: the data, on their slots.
      context: the order of each example, and its condition.
      dropout_key: trains with dropout; None does without.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden, _ = generator.apply(params, values, context, chunk, deterministic=dropout_key is None, rngs=rngs)
    asked = np.flatnonzero(np.asarray(chunk.target) >= 0)
    return hidden[:, asked], take(values, context.slots[:, np.asarray(chunk.target)[asked]])
