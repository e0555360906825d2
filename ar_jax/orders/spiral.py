"""Spiral scans."""

from __future__ import annotations

import numpy as np

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout, Order, coordinates, lexicographic, one_by_one, one_grid


def spiral(layout: Layout, outward: bool = False) -> Order:
    """Clockwise along the border of the last two axes and then inwards, plane after plane if there are more axes.

    Args:
      layout: one grid of at least two axes.
      outward: the same path from its end, so the centre comes first.

    Raises:
      UsageError: a grid with fewer than two axes.
    """
    grid = one_grid(layout, "spiral")
    if len(grid) < 2:
        raise UsageError(f"order 'spiral' needs at least two axes, but the grid is {grid}; use order 'raster'.")
    *planes, row, col = coordinates(layout).T
    height, width = grid[-2:]
    ring = np.minimum.reduce([row, col, height - 1 - row, width - 1 - col])
    along_top_or_right = (row == ring) | (col == width - 1 - ring)
    # From the ring's top left corner, row + col grows along the top and the right side and falls along the other two.
    along = np.where(along_top_or_right, row + col, 2 * (height + width) - row - col)
    sign = -1 if outward else 1
    return one_by_one(lexicographic(*planes, sign * ring, sign * along), layout)
