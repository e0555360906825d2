"""Recent: each step reads the last few steps anew, and nothing else; nothing is remembered (addition of any length, S201)."""

from __future__ import annotations

import numpy as np

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import BLANK, NOWHERE, Feed, chunk, groups, prefix_source
from ar_jax.orders.protocol import Order


def recent(order: Order, num_prefix: int, num_steps: int = 0) -> Feed:
    """Step k is fed the prefix, the tokens of the steps k - num_steps ... k - 1, and a blank for each of its own tokens.

    The tokens that are fed read one another in both directions, and a blank reads them. A network that knows only where they
    are to one another does the same in every step, however long the sequence is: what it was trained on short ones, it does
    on long ones, with any number of layers. (A window of attention does not give this: what a layer reads has itself read
    what was before it.)

    Args:
      order: any.
      num_prefix: prefix tokens.
      num_steps: how many of the last steps are read; 0 reads all.

    Raises:
      UsageError: a negative number of steps.
    """
    if num_steps < 0:
        raise UsageError(f"config.feed.num_steps={num_steps} must be at least 1, or 0 to read all steps.")
    prefix, ranks = [prefix_source(p) for p in range(num_prefix)], groups(order.sizes)
    chunks = []
    for step, now in enumerate(ranks):
        first = max(step - num_steps, 0) if num_steps else 0
        before = np.concatenate([np.zeros(0, np.int32), *ranks[first:step]])
        length = num_prefix + len(before)
        chunks.append(
            chunk(
                source=np.concatenate([prefix, before, np.full(len(now), BLANK)]),
                place=np.concatenate([np.full(num_prefix, NOWHERE), before, now]),
                target=np.concatenate([np.full(length, NOWHERE), now]),
                step=np.full(length + len(now), step),
                num_remembered=length,
            )
        )
    return Feed(tuple(chunks), remembers=False, apart=True)
