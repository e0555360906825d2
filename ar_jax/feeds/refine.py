"""Refine: the coarse codes of all places one by one, then, by a network of its own, the fine codes of all at once (CTF)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import NOWHERE, Feed, chunk, prefix_source
from ar_jax.feeds.shift import shift
from ar_jax.orders.protocol import Order


def refine(order: Order, num_prefix: int) -> Feed:
    """Coarse codes are fed as by `shift`; in the last step the second of two networks is fed all of them anew.

    There each coarse code stands at its place and is asked for the fine code of the same place; they and the prefix read
    one another in both directions, and nothing of what the first network remembers (arXiv:2503.16194, sec. 4.2). Places
    are told by all axes but the last, which counts the codes of a place.

    Args:
      order: "coarse_to_fine" on a grid of two codes a place.
      num_prefix: prefix tokens.

    Raises:
      UsageError: another order.
    """
    count, slots = order.length // 2, np.argsort(order.step, kind="stable")
    codes, cells = order.position[slots, -1], order.position[slots, :-1]
    fits = not order.shuffled and order.length % 2 == 0 and order.sizes == (1,) * count + (count,)
    if not fits or (codes != np.repeat([0, 1], count)).any() or (cells[:count] != cells[count:]).any():
        raise UsageError(
            "feed 'refine' needs config.order.kind='coarse_to_fine' and a tokenizer of two codes a place, such as 'autoencoder' "
            "with quantizer 'vq' and num_clusters, or 'pixels' with depth=2; else use feed 'query'."
        )
    coarse = Order(np.arange(count, dtype=np.int32), cells[:count])
    first = [dataclasses.replace(c, part=0) for c in shift(coarse, num_prefix).chunks]
    ranks, nowhere = np.arange(count), np.full(num_prefix, NOWHERE)
    last = chunk(
        source=[*(prefix_source(p) for p in range(num_prefix)), *ranks],
        place=np.concatenate([nowhere, ranks]),
        target=np.concatenate([nowhere, count + ranks]),
        step=np.full(num_prefix + count, count),
        num_remembered=0,
    )
    last = dataclasses.replace(last, part=1)
    return Feed((*first, last), place_axes=order.position.shape[1] - 1)
