"""Nearby: what is far away is neither read nor kept (the nearby context pool of NUWA-Infinity, S104, arXiv:2207.09814)."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import Feed
from ar_jax.feeds.query import query
from ar_jax.orders.protocol import Order, expand


def nearby(order: Order, num_prefix: int, extent: int | Sequence[int] = 1) -> Feed:
    """As feed "query", but tokens read only tokens of patches that are so near, and those that nobody will read are dropped.

    Which those are follows from the order, so the state holds no more tokens than are needed at a time: of an image that is
    filled row by row, as many rows of patches as the extent says and one more, however high it is. Places are known by how
    far they are from one another alone, if the network's rotations are all that tells them: it then serves grids of any size.

    The paper's order-aware embeddings of places are such rotations here, and a query tells where the next token is to stand:
    our choice, for neither its equations nor its code could be had.

    Args:
      order: any of one grid. Where it is shuffled the state holds all tokens, for it cannot be known what is dropped when.
      num_prefix: prefix tokens, which are near to all and stay.
      extent: along each axis, how many of the order's patches away what is read may be.

    Raises:
      UsageError: a negative extent, or of another number of axes.
    """
    feed, axes = query(order, num_prefix), order.position.shape[1]
    reach = expand(extent, axes, "config.feed.extent")
    if min(reach) < 0:
        raise UsageError(f"config.feed.extent={extent!r} must be at least 0.")
    sides = order.patch or (1,) * axes
    chunks = [dataclasses.replace(chunk, near=(sides, reach)) for chunk in feed.chunks]
    if order.shuffled:
        return dataclasses.replace(feed, chunks=tuple(chunks))
    places = pool_places(order, sides, reach)
    rows = [np.arange(num_prefix), *(num_prefix + p for p in places)]
    chunks = [dataclasses.replace(c, at=at.astype(np.int32)) for c, at in zip(chunks, rows, strict=True)]
    return dataclasses.replace(feed, chunks=tuple(chunks), num_held=1 + max(int(at.max()) for at in rows))


def pool_places(order: Order, sides: Sequence[int], reach: Sequence[int]) -> list[np.ndarray]:
    """Where in a pool the tokens of each step but the last are put, the lowest places first.

    A place is free again once no patch near its token's will be read from: tokens of step s are fed, and so read, in step
    s + 1.
    """
    at = order.position.astype(int) // np.asarray(sides)
    last = np.zeros(at.max(axis=0) + 1, int)
    np.maximum.at(last, tuple(at.T), order.step + 1)
    for axis, distance in enumerate(reach):
        last = _largest_around(last, axis, distance)
    until = last[tuple(at.T)]
    slots = np.split(np.argsort(order.step, kind="stable"), np.cumsum(order.sizes)[:-1])
    free: list[int] = []
    used: list[tuple[int, int]] = []  # (the last step in which it is read, the place)
    size, found = 0, []
    for step, now in enumerate(slots[:-1], start=1):
        while used and used[0][0] < step:
            heapq.heappush(free, heapq.heappop(used)[1])
        for slot in now:
            place = heapq.heappop(free) if free else size
            size = max(size, place + 1)
            heapq.heappush(used, (int(until[slot]), place))
            found.append(place)
    return np.split(np.asarray(found, int), np.cumsum([len(now) for now in slots[:-1]])[:-1])


def _largest_around(values: np.ndarray, axis: int, distance: int) -> np.ndarray:
    """The largest value up to so far away along an axis, for each."""
    values = np.moveaxis(values, axis, 0)
    distance = min(distance, len(values) - 1)
    padded = np.pad(values, [(distance, distance)] + [(0, 0)] * (values.ndim - 1))
    largest = np.max([padded[i : i + len(values)] for i in range(2 * distance + 1)], axis=0)
    return np.moveaxis(largest, 0, axis)
