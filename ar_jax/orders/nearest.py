"""Next-neighbour order (NAR, S016): the frontier of a growing region is generated in parallel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout, Order, coordinates, expand, lexicographic, one_by_one, one_grid, together


def nearest(layout: Layout, start: int | Sequence[int] = 0, parallel: bool = True) -> Order:
    """All cells at Manhattan distance d from the start cell are generated in step d.

    Args:
      layout: one grid; an n x n grid from its corner takes 2n - 1 steps.
      start: the coordinates of the first cell (one number serves all axes).
      parallel: False walks each ring cell by cell.

    Raises:
      UsageError: a start outside the grid.
    """
    grid = one_grid(layout, "nearest")
    first = expand(start, len(grid), "config.order.start")
    if not all(0 <= s < n for s, n in zip(first, grid, strict=True)):
        raise UsageError(f"config.order.start={first} lies outside the grid {grid}.")
    distance = np.abs(coordinates(layout) - np.asarray(first)).sum(axis=1)
    return (
        together(distance, layout) if parallel else one_by_one(lexicographic(distance, *coordinates(layout).T), layout)
    )
