"""Shift: the tokens of the step before are fed, each asked for a token of the next step (LlamaGen, RAR, PAR)."""

from __future__ import annotations

import numpy as np

from ar_jax.feeds.protocol import NOWHERE, Feed, chunk, groups, opening, prefix_source
from ar_jax.orders.protocol import Order


def shift(order: Order, num_prefix: int, transition: bool = False) -> Feed:
    """Step k is fed all tokens of step k-1.

    Where a step is larger than the one before, tokens are fed more than once, in proportion; where it is smaller, some
    are asked for nothing: none is left out, so nothing known is hidden from the model.

    Args:
      order: any.
      num_prefix: prefix tokens.
      transition: where a step is larger than the one before, learned tokens without a place ask for what is more (PAR,
        S021, arXiv:2412.15119, sec. 3.3); they are remembered.
    """
    ranks, learned = groups(order.sizes), 0
    chunks = [opening(num_prefix, len(ranks[0]), placed=False)]
    for step, (before, now) in enumerate(zip(ranks, ranks[1:], strict=False), start=1):
        more = len(now) - len(before)
        if transition and more > 0:
            new = [prefix_source(num_prefix + i) for i in range(learned, learned + more)]
            place = np.concatenate([before, np.full(more, NOWHERE)])
            chunks.append(chunk([*before, *new], place, target=now, step=np.full(len(now), step)))
            learned += more
            continue
        length = max(len(before), len(now))
        source = before[np.arange(length) * len(before) // length]
        target = np.full(length, NOWHERE)
        target[np.arange(len(now)) * length // len(now)] = now
        chunks.append(chunk(source, place=source, target=target, step=np.full(length, step)))
    return Feed(tuple(chunks), num_transition=learned)
