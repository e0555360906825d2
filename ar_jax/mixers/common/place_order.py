"""The order of places, for mixers that read a whole sequence at once, from both of its sides."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.mixers.protocol import NEVER, Tokens, segment_starts, take


def in_place_order(mix: Callable[[Array, Tokens], Array], x: Array, tokens: Tokens) -> Array:
    """Applies a mixer to tokens that stand in the order of their places, whenever they come.

    Args:
      mix: (x [B, T, D], tokens) to [B, T, D]. Its tokens have rows, segments stand behind one another, padding behind all.
      x: [B, T, D] as fed.
      tokens: when and where they are; without rows they stand as they are fed.
    """
    row = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if tokens.row is None else tokens.row
    keys = [row] if tokens.row is not None else []
    keys += [] if tokens.segment is None else [tokens.segment]
    keys += [(tokens.step >= NEVER).astype(jnp.int32)] if tokens.padded else []
    if not keys:
        return mix(x, dataclasses.replace(tokens, row=row))
    batch = max(len(key) for key in keys)
    forward = jnp.lexsort([jnp.broadcast_to(key, (batch, x.shape[1])) for key in keys], axis=1)
    backward = jnp.argsort(forward, axis=1)

    def ordered(a: Array) -> Array:
        return take(jnp.broadcast_to(a, (batch, *a.shape[1:])), forward)

    there = jax.tree.map(ordered, dataclasses.replace(tokens, row=row, num_known=None))
    return take(mix(take(x, forward), there), backward)


def total(a: Array, tokens: Tokens) -> Array:
    """The sum of a [B, T, ...] over each token's own sequence, [B, 1 or T, ...]; packed ones stand behind one another."""
    if tokens.segment is None:
        return a.sum(axis=1, keepdims=True)
    number = jnp.broadcast_to(jnp.cumsum(segment_starts(tokens.segment), axis=1), a.shape[:2])
    sums = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=a.shape[1]))(a, number)
    return jnp.take_along_axis(sums, number.reshape(*number.shape, *(1,) * (a.ndim - 2)), axis=1)


def written_before_read(tokens: Tokens) -> Tokens:
    """Tokens that are fed twice, once to write and once to ask: so those of a segment all read all of it.

    A mixer that reads in the order of time does the rest: its outputs of the second half are those that read everything.
    """
    first = jnp.where(tokens.step < NEVER, 0, NEVER)
    segment = None if tokens.segment is None else jnp.concatenate([tokens.segment] * 2, axis=1)
    position = jnp.concatenate([tokens.position] * 2, axis=1)
    asked = jnp.concatenate([first, jnp.ones_like(first)], axis=1)
    return Tokens(asked, position, num_remembered=first.shape[1], segment=segment, padded=True)
