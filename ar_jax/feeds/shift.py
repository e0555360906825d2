"""Shift: the tokens of the step before are fed, each asked for a token of the next step (LlamaGen, RAR, PAR)."""

from __future__ import annotations

import numpy as np

from ar_jax.feeds.protocol import NOWHERE, Feed, chunk, groups, opening
from ar_jax.orders.protocol import Order


def shift(order: Order, num_prefix: int) -> Feed:
    """Step k is fed all tokens of step k-1.

    Where a step is larger than the one before, tokens are fed more than once, in proportion; where it is smaller, some
    are asked for nothing: none is left out, so nothing known is hidden from the model.
    """
    ranks = groups(order.sizes)
    chunks = [opening(num_prefix, len(ranks[0]), placed=False)]
    for step, (before, now) in enumerate(zip(ranks, ranks[1:], strict=False), start=1):
        length = max(len(before), len(now))
        source = before[np.arange(length) * len(before) // length]
        target = np.full(length, NOWHERE)
        target[np.arange(len(now)) * length // len(now)] = now
        chunks.append(chunk(source, place=source, target=target, step=np.full(length, step)))
    return Feed(tuple(chunks))
