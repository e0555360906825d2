"""Exact log-likelihoods: the same network, fed the data instead of its own draws."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ar_jax.feeds.protocol import Chunk
from ar_jax.mixers.protocol import take
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context
from ar_jax.sampling.loop import Params, Step, walk


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
    if model.feed.has_parallel:
        hidden, target = teacher_forced(model, model.feed.parallel(), params, values, context)
        return model.ask(params, "log_prob", hidden, target).sum(axis=1)

    def body(total: Array, step: Step, chunk: Chunk) -> Array:
        hidden, _ = model.read(params, values, context, chunk)
        target = take(values, context.slots[:, jnp.maximum(chunk.answers, 0)])
        nats = model.ask(params, "log_prob", chunk.pick(hidden), target)
        return total + (nats * (chunk.answers >= 0)[None]).sum(axis=1)

    return walk(model.feed, body, jnp.zeros(len(values), jnp.float32))


def teacher_forced(
    model: Autoregressive,
    chunk: Chunk,
    params: Params,
    values: Array,
    context: Context,
    dropout_key: Array | None = None,
) -> tuple[Array, Array]:
    """All of a chunk's answers: hidden vectors [B, n, D] and the tokens that they should predict, [B, n, ...].

    Args:
      model: network, order and feed.
      chunk: with targets known while tracing.
      params: the network's parameters.
      values: the data, on their slots.
      context: the order of each example, and its condition.
      dropout_key: trains with dropout; None does without.
    """
    hidden, _ = model.read(params, values, context, chunk, dropout_key=dropout_key)
    return chunk.pick(hidden), take(values, context.slots[:, chunk.answers])
