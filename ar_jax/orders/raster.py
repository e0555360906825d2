"""Scans that read a grid line by line: row by row, column by column, from right to left."""

from __future__ import annotations

import numpy as np

from ar_jax.orders.protocol import Layout, Order, coordinates, lexicographic, one_by_one, one_grid


def raster(layout: Layout) -> Order:
    """Row by row, each from its first cell to its last (PixelRNN, arXiv:1601.06759). Several grids follow one another."""
    return one_by_one(np.arange(len(coordinates(layout))), layout)


def column(layout: Layout) -> Order:
    """Column by column: the last axis is the slowest."""
    one_grid(layout, "column")
    return one_by_one(lexicographic(*coordinates(layout).T[::-1]), layout)


def right_to_left(layout: Layout, columns: bool = False) -> Order:
    """Raster order with the last axis running backwards, so that the digits of a sum come after their carries (S201).

    Args:
      layout: one grid.
      columns: the last axis is the slowest: column by column, each from its first row to its last.
    """
    one_grid(layout, "right_to_left")
    *others, last = coordinates(layout).T
    return one_by_one(lexicographic(-last, *others) if columns else lexicographic(*others, -last), layout)
