"""Next-block order (NBP, S144): whole rows, frames or patches at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout, Order, coordinates, expand, one_grid, together


def blocks(layout: Layout, block: int | Sequence[int] | None = None) -> Order:
    """Blocks in raster order, all tokens of a block in one step.

    Args:
      layout: one grid.
      block: the block's side along each axis, which must divide the grid; None takes all axes but the first whole:
        a row of an image, a frame of a video, a token of a text.

    Raises:
      UsageError: a block that does not divide the grid.
    """
    grid = one_grid(layout, "blocks")
    sides = np.asarray((1, *grid[1:]) if block is None else expand(block, len(grid), "config.order.block"))
    if (sides < 1).any() or (np.asarray(grid) % sides).any():
        raise UsageError(f"config.order.block={tuple(sides.tolist())} must divide the grid {grid}.")
    return together(np.ravel_multi_index((coordinates(layout) // sides).T, np.asarray(grid) // sides), layout)
