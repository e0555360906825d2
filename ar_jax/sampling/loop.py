"""One loop generates with every order: it walks the steps of a feed, draws their tokens, and writes them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from ar_jax.feeds.protocol import Chunk, Feed
from ar_jax.heads.protocol import Sampling
from ar_jax.mixers.protocol import State, take
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context

Params = Any
Carry = Any


@struct.dataclass
class Given:
    """Tokens that are not drawn but kept: for in-painting, out-painting and continuation.

    Attributes:
      values: [B, L] int32 or [B, L, C] float, on their slots.
      mask: [B, L] bool, where they are given.
    """

    values: Array
    mask: Array


def walk(feed: Feed, body: Callable[[Carry, Array, Chunk, np.ndarray], Carry], carry: Carry) -> Carry:
    """Runs `body(carry, step, chunk, asked)` over all steps: one scan per run of steps of equal shape.

    `asked` [n] are the places of the fed tokens that answer, the same in each step of a run; chunk.target[asked] are
    the ranks that they answer for.
    """
    for first, run in feed.runs():
        asked = np.flatnonzero(np.asarray(run.target)[0] >= 0)

        def one(carry: Carry, inputs: tuple[Array, Chunk], asked: np.ndarray = asked) -> tuple[Carry, None]:
            step, chunk = inputs
            return body(carry, step, chunk, asked), None

        steps = jnp.arange(first, first + len(run.target))
        carry, _ = jax.lax.scan(one, carry, (steps, jax.tree.map(jnp.asarray, run)))
    return carry


def generate(
    model: Autoregressive,
    params: Params,
    context: Context,
    key: Array,
    settings: Sampling,
    guidance_scales: Array | None = None,
    given: Given | None = None,
) -> Array:
    """Generates a batch. Compiled whole by the caller; nothing leaves the device before the last token.

    Args:
      model: network, order and feed.
      params: the network's parameters.
      context: the order of each of the B examples, and its condition.
      key: seeds all draws.
      settings: temperature and filters.
      guidance_scales: [num_steps] scales of classifier-free guidance; None runs the model once per step instead of twice.
      given: tokens to keep.

    Returns:
      [B, L] int32 or [B, L, C] float32 tokens on their slots.
    """
    feed, batch = model.feed, len(context.slots)
    fed = context if guidance_scales is None else both_branches(context)
    state = (
        model.generator.decoder.init_state(len(fed.slots), feed.max_len, feed.max_step_len) if feed.remembers else None
    )
    values = model.empty_values(batch)
    values = (
        values if given is None else jnp.where(_over(given.mask, values), given.values.astype(values.dtype), values)
    )

    def body(carry: tuple[Array, State], step: Array, chunk: Chunk, asked: np.ndarray) -> tuple[Array, State]:
        values, state = carry
        seen = values if guidance_scales is None else jnp.concatenate([values, values])
        hidden, state = model.read(params, seen, fed, chunk, state)
        hidden = hidden[:, asked]
        draw_key = jax.random.fold_in(key, step)
        guided = () if guidance_scales is None else (hidden[batch:], guidance_scales[step])
        drawn = model.ask(params, "sample", hidden[:batch], draw_key, settings, *guided)
        slots = context.slots[:, chunk.target[asked]]  # [B, n]
        if given is not None:
            drawn = jnp.where(_over(take(given.mask, slots), drawn), take(values, slots), drawn)
        return values.at[jnp.arange(batch)[:, None], slots].set(drawn.astype(values.dtype), unique_indices=True), state

    return walk(feed, body, (values, state))[0]


def both_branches(context: Context) -> Context:
    """The batch twice: with its condition, then without."""
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), context)
    return dataclasses.replace(twice, drop=jnp.concatenate([context.drop, jnp.ones_like(context.drop)]))


def _over(mask: Array, values: Array) -> Array:
    """A mask [B, T] with axes of size 1 up to the rank of `values`."""
    return mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
