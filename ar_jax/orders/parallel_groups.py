"""Groups of distant tokens in parallel (PAR, S021): one token of every region a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout, Order, coordinates, expand, one_grid, together


def parallel_groups(layout: Layout, regions: int | Sequence[int] = 2, sequential_start: bool = True) -> Order:
    """The grid is cut into regions; step by step each region gets its next token, in raster order inside the region.

    Args:
      layout: one grid.
      regions: the number of regions along each axis (one number serves all axes); it must divide the grid.
      sequential_start: the first tokens of the regions come one after another, so that they agree on the whole (arXiv:2412.15119).

    Raises:
      UsageError: regions that do not divide the grid.
    """
    grid = one_grid(layout, "parallel_groups")
    counts = np.asarray(expand(regions, len(grid), "config.order.regions"))
    if (counts < 1).any() or (np.asarray(grid) % counts).any():
        raise UsageError(f"config.order.regions={tuple(counts.tolist())} must divide the grid {grid}.")
    cells, sides = coordinates(layout), np.asarray(grid) // counts
    region = np.ravel_multi_index((cells // sides).T, counts)
    inside = np.ravel_multi_index((cells % sides).T, sides)
    if sequential_start:
        inside = np.where(inside == 0, region, inside + int(np.prod(counts)))
    return together(inside, layout)
