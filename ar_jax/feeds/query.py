"""Query: blank tokens at the positions to fill ask; the tokens of the step before ride along (ARPG, LPD)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.feeds.protocol import BLANK, NOWHERE, Chunk, Feed, chunk, groups, prefix_source, prefix_steps
from ar_jax.orders.protocol import Order


def query(order: Order, num_prefix: int) -> Feed:
    """Step k is fed the tokens of step k-1, which are remembered, and one query for each of its own tokens, which is not.

    Content never reads a query, for queries are not remembered; a query reads all content up to its own step.

    An adaptive order asks for all tokens that are left in every step, and decides after the answers which of them come next:
    so the network tells where and what in one (S175, arXiv:2504.17069).
    Tokens that are told are fed behind the prefix, in the first step that draws.
    """
    ranks = groups(order.sizes)
    chunks = []
    for step, now in enumerate(ranks):
        if order.told and not step:
            continue
        content = ranks[step - 1] if step else np.zeros(0, int)
        place, steps = content, np.full(len(content), step)
        if step == int(order.told):
            content = np.concatenate([[prefix_source(p) for p in range(num_prefix)], content]).astype(int)
            place = np.concatenate([np.full(num_prefix, NOWHERE), place])
            steps = np.concatenate([prefix_steps(num_prefix), steps])
        if order.adaptive:
            chunks.append(_left(content, place, steps, step, int(now[0]), order.length))
            continue
        chunks.append(
            chunk(
                source=np.concatenate([content, np.full(len(now), BLANK)]),
                place=np.concatenate([place, now]),
                target=np.concatenate([np.full(len(content), NOWHERE), now]),
                step=np.concatenate([steps, np.full(len(now), step)]),
                num_remembered=len(content),
            )
        )
    return Feed(tuple(chunks))


def _left(content: np.ndarray, place: np.ndarray, steps: np.ndarray, step: int, start: int, length: int) -> Chunk:
    """A step that is fed `content` and asks for every rank from `start` on; the ranks before only pad."""
    rank = np.arange(length)
    left = np.where(rank >= start, rank, NOWHERE)
    return chunk(
        source=np.concatenate([content, np.full(length, BLANK)]),
        place=np.concatenate([place, rank]),
        target=np.concatenate([np.full(len(content), NOWHERE), left]),
        step=np.concatenate([steps, np.full(length, step)]),
        num_remembered=len(content),
        asked=len(content) + rank,
        answers=left,
    )


def grouped_chunk(num_prefix: int, step: jax.Array) -> Chunk:
    """All that `query` feeds, at once, where the groups are data: what each rank's step is may differ between examples.

    Args:
      num_prefix: prefix tokens, P.
      step: [B, L] int32, the step of each rank, ascending.

    Returns:
      A chunk of P + L remembered tokens and L queries, with step [B, P + 2 L]; nobody reads the last group's tokens.
    """
    batch, length = step.shape
    rank, prefix = np.arange(length), np.full(num_prefix, NOWHERE)
    whole = chunk(
        source=np.concatenate([[prefix_source(p) for p in range(num_prefix)], rank, np.full(length, BLANK)]),
        place=np.concatenate([prefix, rank, rank]),
        target=np.concatenate([prefix, np.full(length, NOWHERE), rank]),
        step=np.zeros(num_prefix + 2 * length),
        num_remembered=num_prefix + length,
    )
    first = jnp.broadcast_to(jnp.asarray(prefix_steps(num_prefix), jnp.int32)[None], (batch, num_prefix))
    return dataclasses.replace(whole, step=jnp.concatenate([first, step + 1, step], axis=1).astype(jnp.int32))
