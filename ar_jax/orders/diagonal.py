"""Diagonal scans, after "Direction-Aware Diagonal Autoregressive Image Generation" (S196)."""

from __future__ import annotations

import numpy as np

from ar_jax.orders.protocol import Layout, Order, coordinates, lexicographic, one_by_one, one_grid, together


def diagonal(layout: Layout, parallel: bool = False, zigzag: bool = False) -> Order:
    """Anti-diagonal by anti-diagonal from the first corner, each walked from its first row to its last.

    Args:
      layout: one grid of any number of axes.
      parallel: a whole diagonal is one step, so an n x n grid takes 2n - 1 steps.
      zigzag: every other diagonal is walked from its last row to its first, so that on a grid of two axes each cell touches
        the one before it (arXiv:2503.11129, sec. 3.2).
    """
    one_grid(layout, "diagonal")
    cells = coordinates(layout)
    total = cells.sum(axis=1)
    if parallel:
        return together(total, layout)
    turned = np.where(total[:, None] % 2 == 0, -cells, cells) if zigzag else cells
    return one_by_one(lexicographic(total, *turned.T), layout)
