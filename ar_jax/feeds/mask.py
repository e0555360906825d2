"""Mask: all that is known, blanks elsewhere; every token reads every other (MaskGIT, MAR)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.feeds.protocol import BLANK, NOWHERE, Chunk, Feed, chunk, prefix_source
from ar_jax.orders.protocol import Order


def mask(order: Order, num_prefix: int) -> Feed:
    """Every step is fed the whole sequence, with blanks at its own and all later tokens; nothing is remembered."""
    ends = np.cumsum(order.sizes)
    prefix = [prefix_source(p) for p in range(num_prefix)]
    rank = np.arange(order.length)
    chunks = []
    for size, end in zip(order.sizes, ends, strict=True):
        start = end - size
        chunks.append(
            chunk(
                source=np.concatenate([prefix, np.where(rank < start, rank, BLANK)]),
                place=np.concatenate([np.full(num_prefix, NOWHERE), rank]),
                target=np.concatenate(
                    [np.full(num_prefix, NOWHERE), np.where((rank >= start) & (rank < end), rank, NOWHERE)]
                ),
                step=np.zeros(num_prefix + order.length),
            )
        )
    return Feed(tuple(chunks), remembers=False)


def masked_chunk(length: int, num_prefix: int, known: jax.Array) -> Chunk:
    """The chunk in which the first `known` ranks have values; every rank is asked for.

    Args:
      length: the number of tokens, L.
      num_prefix: the number of prefix tokens, P.
      known: [B] int32, between 0 and L.

    Returns:
      A chunk with source [B, P + L] and the other arrays [P + L].
    """
    rank = np.arange(length)
    codes = np.concatenate([np.full(num_prefix, NOWHERE), rank])
    whole = chunk(source=codes, place=codes, target=codes, step=np.zeros(len(codes)))
    prefix = jnp.broadcast_to(jnp.asarray([[prefix_source(p) for p in range(num_prefix)]]), (len(known), num_prefix))
    source = jnp.where(rank[None] < known[:, None], rank[None], BLANK)
    return dataclasses.replace(whole, source=jnp.concatenate([prefix, source], axis=1).astype(jnp.int32))
