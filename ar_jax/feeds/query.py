"""Query: blank tokens at the positions to fill ask; the tokens of the step before ride along (ARPG, LPD)."""

from __future__ import annotations

import numpy as np

from ar_jax.feeds.protocol import BLANK, NOWHERE, Feed, chunk, groups, prefix_source, prefix_steps
from ar_jax.orders.protocol import Order


def query(order: Order, num_prefix: int) -> Feed:
    """Step k is fed the tokens of step k-1, which are remembered, and one query for each of its own tokens, which is not.

    Content never reads a query, for queries are not remembered; a query reads all content up to its own step.
    """
    ranks = groups(order.sizes)
    chunks = []
    for step, now in enumerate(ranks):
        content = ranks[step - 1] if step else np.asarray([prefix_source(p) for p in range(num_prefix)])
        place = content if step else np.full(num_prefix, NOWHERE)
        chunks.append(
            chunk(
                source=np.concatenate([content, np.full(len(now), BLANK)]),
                place=np.concatenate([place, now]),
                target=np.concatenate([np.full(len(content), NOWHERE), now]),
                step=np.concatenate(
                    [np.full(len(content), step) if step else prefix_steps(num_prefix), np.full(len(now), step)]
                ),
                num_remembered=len(content),
            )
        )
    return Feed(tuple(chunks))
