"""Locality-aware order (LPD, S116): each step takes cells that lie beside known ones, and far from one another."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.orders.protocol import Layout, Order, coordinates, one_grid
from ar_jax.orders.random import step_sizes

SAME = 1e-4  # sums of inverse distances that differ by less are equal


def locality(
    layout: Layout,
    num_steps: int | None = None,
    sizes: str | Sequence[int] = "rounded_cosine",
    proximity: float = 1.0,
    repulsion: float = 1.0,
) -> Order:
    """An order per example, drawn from a key: what is beside known cells first, but no two neighbours in one step.

    The proximity of a cell is the sum of 1 / distance over the known cells that touch it, corners included. A step takes,
    from the greatest proximity down, cells of at least `proximity` that are more than `repulsion` cells away from those it
    has taken; when there are no more, the cell farthest from those it has taken. Ties are broken by chance, and the first
    cell is drawn evenly (arXiv:2507.01957, sec. 3.3).

    Args:
      layout: one grid of any number of axes.
      num_steps: steps of the generation; None gives one token a step.
      sizes: of the steps, see order "random".
      proximity: the least proximity of a cell that is taken for it.
      repulsion: cells of one step are farther apart than this along some axis, as long as there are such cells.

    Raises:
      UsageError: several grids, or sizes that do not fit.
    """
    one_grid(layout, "locality")
    cells = coordinates(layout)
    counts = step_sizes(sizes, len(cells), num_steps)
    step = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    deal = functools.partial(_deal, step, cells, proximity, repulsion)
    return Order(step, cells, shuffled=True, deal=deal)


def _neighbours(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[L, M] int the cells that touch each one, L where there are fewer than M, and [L, M] their inverse distances."""
    apart = np.abs(cells[:, None] - cells[None])
    touching = (apart.max(axis=-1) == 1).astype(int)
    most, length = int(touching.sum(axis=1).max(initial=0)), len(cells)
    near = np.argsort(-touching, axis=1, kind="stable")[:, :most]
    some = np.take_along_axis(touching, near, axis=1) == 1
    distance = np.sqrt(np.square(np.take_along_axis(apart, near[..., None], axis=1)).sum(axis=-1))
    return np.where(some, near, length), np.where(some, 1 / np.maximum(distance, 1), 0).astype(np.float32)


def _deal(step: np.ndarray, cells: np.ndarray, proximity: float, repulsion: float, key: Array, first: Array) -> Array:
    """The slots of one example in the order of their generation, [L] int32; those where first [L] is true in front."""
    length, places = len(cells), jnp.asarray(cells)
    near, weight = (jnp.asarray(a) for a in _neighbours(cells))
    begins = np.concatenate([[True], step[1:] != step[:-1]])
    far = jnp.full(length, jnp.iinfo(jnp.int32).max)

    def take(carry: Any, now: tuple[Array, Array]) -> tuple[Any, Array]:
        free, known, apart, distance = carry  # apart: along the axis of most cells; distance: squared
        begin, rank = now
        known = jnp.where(begin, ~free, known)
        apart, distance = jnp.where(begin, far, apart), jnp.where(begin, far, distance)
        beside = (jnp.append(known, False)[near] * weight).sum(axis=1)
        close = free & (beside >= proximity - SAME) & (apart > repulsion)
        farthest = free & (distance == jnp.where(free, distance, -1).max())
        low = jnp.where(
            (beside < proximity - SAME) & (distance < far).any(), length, 0
        )  # these come first among equals
        wanted = jnp.where(close.any(), close, farthest)
        rating = jnp.where(close.any(), beside, jnp.where((distance < far).any(), low + beside, 0))
        wanted = jnp.where((free & first).any(), free & first, wanted)
        rating = jnp.where((free & first).any(), 0, rating)
        wanted &= rating >= jnp.where(wanted, rating, -1).max() - SAME
        chance = jax.random.uniform(jax.random.fold_in(key, rank), (length,))
        taken = jnp.where(wanted, chance, -1).argmax()
        gap = jnp.abs(places - places[taken][None])
        after = free.at[taken].set(False), known, jnp.minimum(apart, gap.max(axis=1))
        return (*after, jnp.minimum(distance, jnp.square(gap).sum(axis=1))), taken.astype(jnp.int32)

    start = jnp.ones(length, bool), jnp.zeros(length, bool), far, far
    return jax.lax.scan(take, start, (jnp.asarray(begins), jnp.arange(length)))[1]
