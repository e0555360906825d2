"""Resize: each token of a scale is fed what is known of its place, the scale before resampled to this one (VAR).

The same holds for the rows of an image and the frames of a video, where the step before has the same size (NBP, S144).
"""

from __future__ import annotations

import numpy as np

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import Feed, chunk, groups, opening
from ar_jax.orders.protocol import Order


def follows_first_axis(order: Order) -> bool:
    """Whether the steps are the indices of the first axis: the scales of a pyramid, the frames of a video, rows."""
    return not order.shuffled and order.position.shape[1] > 1 and np.array_equal(order.step, order.position[:, 0])


def resize(order: Order, num_prefix: int, resampled: bool = False) -> Feed:
    """Step k is fed, for each of its cells, the token of scale k-1 whose cell covers it, placed where the answer goes.

    Args:
      order: its steps are the indices of its first axis.
      num_prefix: prefix tokens.
      resampled: the tokenizer itself gives what is fed for each cell, from all scales before (VAR, arXiv:2404.02905).

    Raises:
      UsageError: the steps of the order are not the scales, frames or rows.
    """
    if not follows_first_axis(order):
        raise UsageError(
            "feed 'resize' needs one step per scale, frame or row, as orders 'next_scale' and 'blocks' give; else use feed 'query'."
        )
    slots = np.argsort(order.step, kind="stable")
    ranks = groups(order.sizes)
    chunks = [opening(num_prefix, len(ranks[0]), placed=resampled)]
    for step, (before, now) in enumerate(zip(ranks, ranks[1:], strict=False), start=1):
        covering = before[_covering(order.position[slots[before], 1:], order.position[slots[now], 1:])]
        chunks.append(chunk(now if resampled else covering, place=now, target=now, step=np.full(len(now), step)))
    return Feed(tuple(chunks), resampled=resampled)


def _covering(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """For each fine cell the coarse cell that covers it: the last one that starts at or before it on every axis."""
    starts_before = (coarse[None] <= fine[:, None]).all(axis=-1)  # [fine, coarse]
    return np.where(starts_before, coarse.sum(axis=-1), -1).argmax(axis=-1)
