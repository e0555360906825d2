"""Coarse-to-fine orders: a pyramid of grids (VAR, S023), or one grid by ever finer sub-sampling."""

from __future__ import annotations

import numpy as np

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout, Order, coordinates, one_grid, together


def next_scale(layout: Layout) -> Order:
    """Each grid of a pyramid is one step, from coarse to fine (arXiv:2404.02905).

    Raises:
      UsageError: the tokenizer gives one grid only.
    """
    if len(layout) < 2:
        raise UsageError(
            "order 'next_scale' needs a tokenizer with several scales, such as 'pixel_pyramid'; for one grid use order 'subsample'."
        )
    return together(coordinates(layout)[:, 0], layout)


def subsample(layout: Layout, levels: int | None = None) -> Order:
    """Every 2^j-th cell along each axis first, then the cells between them, level by level (arXiv:1703.03664).

    Args:
      layout: one grid.
      levels: the number of halvings; None starts from a single cell.
    """
    grid = one_grid(layout, "subsample")
    most = max(int(np.ceil(np.log2(max(grid)))), 0)
    levels = most if levels is None else levels
    if not 0 <= levels <= most:
        raise UsageError(f"config.order.levels={levels} must lie between 0 and {most} for the grid {grid}.")
    cells = coordinates(layout)
    level = np.full(len(cells), levels)
    for j in range(levels + 1):  # the coarsest sub-sampling that holds a cell decides
        level = np.where((cells % 2**j == 0).all(axis=1), levels - j, level)
    return together(level, layout)
