"""Diagonal scans, after "Direction-Aware Diagonal Autoregressive Image Generation" (S196)."""

from __future__ import annotations

from ar_jax.orders.protocol import Layout, Order, coordinates, lexicographic, one_by_one, one_grid, together


def diagonal(layout: Layout, parallel: bool = False) -> Order:
    """Anti-diagonal by anti-diagonal from the first corner, each walked from its first row to its last.

    Args:
      layout: one grid of any number of axes.
      parallel: a whole diagonal is one step, so an n x n grid takes 2n - 1 steps.
    """
    one_grid(layout, "diagonal")
    cells = coordinates(layout)
    total = cells.sum(axis=1)
    return together(total, layout) if parallel else one_by_one(lexicographic(total, *cells.T), layout)
