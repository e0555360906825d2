"""Patches in one order, the places inside a patch in another (NUWA-Infinity, S104, arXiv:2207.09814)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.config import UsageError, build
from ar_jax.orders.protocol import Layout, Order, coordinates, expand, in_front, one_grid


def patches(
    layout: Layout,
    patch: int | Sequence[int] = 4,
    over: Mapping[str, Any] | None = None,
    inside: Mapping[str, Any] | None = None,
    flip: Sequence[int] = (),
) -> Order:
    """Patch by patch, and place by place inside a patch: autoregressive over autoregressive.

    Patches that `over` takes in one step are filled side by side.

    Args:
      layout: one grid.
      patch: the patch's side along each axis, which must divide the grid.
      over: `kind` and options of the order of the patches, any that walks one grid; None takes "raster".
      inside: the same of the places of a patch, none that is shuffled; None takes "raster".
      flip: axes along which patches are taken from the grid's end: every direction in which an image can grow.

    Raises:
      UsageError: a patch that does not divide the grid, an axis that is not there, or a shuffled order inside.
    """
    from ar_jax.orders import ORDERS  # which has this order, too

    grid = one_grid(layout, "patches")
    sides = np.asarray(expand(patch, len(grid), "config.order.patch"))
    if (sides < 1).any() or (np.asarray(grid) % sides).any():
        raise UsageError(f"config.order.patch={tuple(sides.tolist())} must divide the grid {grid}.")
    if not set(flip) <= set(range(len(grid))):
        raise UsageError(f"config.order.flip={tuple(flip)} must name axes of the grid {grid}, from 0 on.")
    counts = np.asarray(grid) // sides
    outer: Order = build(ORDERS, over or {"kind": "raster"}, "order.over", layout=(tuple(counts.tolist()),))
    inner: Order = build(ORDERS, inside or {"kind": "raster"}, "order.inside", layout=(tuple(sides.tolist()),))
    if inner.shuffled:
        raise UsageError("config.order.inside must be the same for all patches; choose an order that is not shuffled.")
    position = coordinates(layout)
    at = position // sides
    for axis in flip:
        at[:, axis] = counts[axis] - 1 - at[:, axis]
    number, cell = np.ravel_multi_index(at.T, counts), np.ravel_multi_index((position % sides).T, sides)
    step = outer.step[number] * inner.num_steps + inner.step[cell]
    made = Order(step.astype(np.int32), position, patch=tuple(sides.tolist()))
    if not outer.shuffled:
        return made
    slot_of = np.empty((len(outer.step), len(inner.step)), np.int32)
    slot_of[number, cell] = np.arange(len(number))
    by_rank = np.sort(outer.step)[:, None] * inner.num_steps + inner.step[None]  # of the patch that comes k-th
    ranks = np.argsort(by_rank.reshape(-1), kind="stable")

    def deal(key: jax.Array, first: jax.Array) -> jax.Array:
        return in_front(jnp.asarray(slot_of)[outer.slots(key, 1)[0]].reshape(-1)[ranks], first)

    return dataclasses.replace(made, shuffled=True, deal=deal)
