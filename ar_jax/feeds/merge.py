"""Merge: one token is fed for several, and asked for several by outputs of its own (DnD-Transformer, Token-Shuffle)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import NOWHERE, Feed, chunk, prefix_source, prefix_steps
from ar_jax.orders.protocol import Order


def merge(order: Order, num_prefix: int) -> Feed:
    """Each evaluation of the network is fed one token for R tokens together, and its R outputs answer for the next R.

    What stands together is either the codes of one place, along the last axis, which come one after the other: the network
    draws each between its layers, and the layers behind read it (DnD-Transformer, S171, arXiv:2410.01912). The place of the
    fed token is told by the other axes. Or it is a block of tokens that one step draws at once (Token-Shuffle, S035,
    arXiv:2504.17789), and the place is that of the block, on a grid of blocks.

    Args:
      order: one token a step, the codes of each place in a row; or steps that are blocks of one shape, as "blocks" gives.
      num_prefix: prefix tokens, P.

    Raises:
      UsageError: the tokens of the order do not stand together so.
    """
    slots = np.argsort(order.step, kind="stable")
    cells, by_code = order.position[slots].astype(int), max(order.sizes) == 1
    count = int(cells[:, -1].max()) + 1 if by_code else order.sizes[0]
    if order.shuffled or len(cells) % count or (not by_code and len(set(order.sizes)) > 1):
        raise _apart()
    places = cells.reshape(-1, count, cells.shape[1])
    sides = np.ones(cells.shape[1], int) if by_code else 1 + (places.max(axis=1) - places.min(axis=1))[0]
    if not _together(places, sides, by_code):
        raise _apart()
    ranks = np.arange(len(cells)).reshape(-1, count)
    nowhere = np.full(num_prefix, NOWHERE)
    lead = np.full((num_prefix - 1, count), NOWHERE)
    chunks = [
        dataclasses.replace(
            chunk(
                source=[prefix_source(p) for p in range(num_prefix)],
                place=nowhere,
                target=nowhere,
                step=prefix_steps(num_prefix),
                asked=np.full(count, num_prefix - 1),
                answers=ranks[0],
            ),
            members=np.zeros((num_prefix, count), np.int32),
            between=np.concatenate([lead, ranks[:1]]).astype(np.int32)[:, :-1] if by_code else None,
        )
    ]
    for step, (before, now) in enumerate(zip(ranks, ranks[1:], strict=False), start=1):
        fed = chunk(before[:1], before[:1], [NOWHERE], [step], asked=np.zeros(count), answers=now)
        members, read = before[None].astype(np.int32), now[None, :-1].astype(np.int32) if by_code else None
        chunks.append(dataclasses.replace(fed, members=members, between=read))
    shape: dict[str, Any] = {"cell_side": 1 if by_code else tuple(sides.tolist()), "num_outputs": count}
    whole = tuple(dataclasses.replace(c, **shape) for c in chunks)
    return Feed(whole, place_axes=cells.shape[1] - 1 if by_code else None)


def _together(places: np.ndarray, sides: np.ndarray, by_code: bool) -> bool:
    """Whether [K, R, D] cells are the codes of one place each, or blocks of these sides on a grid of such blocks."""
    if by_code:
        same = (places[:, :, :-1] == places[:, :1, :-1]).all()
        return bool(places.shape[2] > 1 and same and (places[:, :, -1] == np.arange(places.shape[1])[None]).all())
    return int(np.prod(sides)) == places.shape[1] and bool((places // sides == places[:, :1] // sides).all())


def _apart() -> UsageError:
    return UsageError(
        "feed 'merge' needs an order of one token a step in which the codes of a place, on the grid's last axis, follow one "
        "another, such as 'raster'; or one of blocks of one shape, such as 'blocks'. Else use feed 'query'."
    )
