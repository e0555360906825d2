"""Mask: all that is known, blanks elsewhere; every token reads every other (MaskGIT, MAR)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.feeds.protocol import BLANK, NOWHERE, Chunk, Feed, chunk, prefix_source
from ar_jax.orders.protocol import Order

STEADY = 1.5  # steps stand in one run while the largest has at most so many times the tokens of the smallest


def mask(order: Order, num_prefix: int) -> Feed:
    """Every step is fed the whole sequence, with blanks at its own and all later tokens; nothing is remembered.

    Steps of nearly equal size are padded to the largest of them, and so share a shape.
    An adaptive order asks for all tokens in every step, and decides after the answers which of them to keep.
    A step whose tokens are told is none.
    """
    sizes = np.asarray(order.sizes)
    starts = np.cumsum(sizes) - sizes
    sizes, starts = sizes[int(order.told) :], starts[int(order.told) :]
    told: dict[str, Any] = {"remembers": False, "beside_given": functools.partial(with_known, num_prefix)}
    if order.adaptive:
        return Feed(tuple(_step(order.length, num_prefix, s, order.length - s, order.length) for s in starts), **told)
    chunks = []
    for run in _steady_runs(sizes):
        last = int(starts[run].max())
        chunks += [_step(order.length, num_prefix, starts[k], sizes[k], int(sizes[run].max()), last) for k in run]
    return Feed(tuple(chunks), **told)


def _steady_runs(sizes: np.ndarray) -> list[list[int]]:
    """The steps, cut into runs of nearly equal size."""
    runs: list[list[int]] = [[0]]
    for k in range(1, len(sizes)):
        run = sizes[[*runs[-1], k]]
        if run.max() <= max(STEADY * run.min(), run.min() + 1):
            runs[-1].append(k)
        else:
            runs.append([k])
    return runs


def _step(length: int, num_prefix: int, start: int, size: int, padded: int, most_known: int | None = None) -> Chunk:
    """The step that asks for ranks start .. start + size - 1, with answers padded to so many."""
    rank, prefix = np.arange(length), [prefix_source(p) for p in range(num_prefix)]
    target = np.where((rank >= start) & (rank < start + size), rank, NOWHERE)
    asked = np.arange(padded) + (0 if padded == length else start)
    return chunk(
        source=np.concatenate([prefix, np.where(rank < start, rank, BLANK)]),
        place=np.concatenate([np.full(num_prefix, NOWHERE), rank]),
        target=np.concatenate([np.full(num_prefix, NOWHERE), target]),
        step=np.zeros(num_prefix + length),
        asked=np.where(asked < length, num_prefix + asked, 0),  # the prefix, asked for nothing, pads the last step
        num_known=num_prefix + (length if most_known is None else most_known),
    )


def with_known(num_prefix: int, step: Chunk, known: jax.Array) -> Chunk:
    """A step of `mask` that is also fed the values of further ranks, known [B, L] bool: nothing that is given is hidden.

    Returns:
      A chunk with source and target [B, P + L].
    """
    rank = jnp.arange(known.shape[1])[None]

    def told(codes: Any, further: Any) -> jax.Array:
        codes = jnp.asarray(codes)[None]
        prefix = jnp.broadcast_to(codes[:, :num_prefix], (len(known), num_prefix))
        return jnp.concatenate([prefix, jnp.where(known, further, codes[:, num_prefix:])], axis=1).astype(jnp.int32)

    source, target = told(step.source, rank), told(step.target, NOWHERE)
    return dataclasses.replace(step, source=source, target=target, num_known=len(step))


def masked_chunk(length: int, num_prefix: int, known: jax.Array, most_known: int | None = None) -> Chunk:
    """The chunk in which the first `known` ranks have values; every rank is asked for.

    Args:
      length: the number of tokens, L.
      num_prefix: the number of prefix tokens, P.
      known: [B] int32, between 0 and L.
      most_known: no example knows more; L if None.

    Returns:
      A chunk with source and target [B, P + L] and the other arrays [P + L]: what is known has no target, as in `mask`.
    """
    rank = np.arange(length)
    codes = np.concatenate([np.full(num_prefix, NOWHERE), rank])
    readable = num_prefix + (length if most_known is None else most_known)
    whole = chunk(source=codes, place=codes, target=codes, step=np.zeros(len(codes)), num_known=readable)
    prefix = jnp.broadcast_to(jnp.asarray([[prefix_source(p) for p in range(num_prefix)]]), (len(known), num_prefix))
    is_known = rank[None] < known[:, None]
    source, target = jnp.where(is_known, rank[None], BLANK), jnp.where(is_known, NOWHERE, rank[None])
    nowhere = jnp.full((len(known), num_prefix), NOWHERE)
    return dataclasses.replace(
        whole,
        source=jnp.concatenate([prefix, source], axis=1).astype(jnp.int32),
        target=jnp.concatenate([nowhere, target], axis=1).astype(jnp.int32),
    )
