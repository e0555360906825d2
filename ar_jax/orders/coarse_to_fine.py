"""Coarse to fine on one grid: the first codes of all places one by one, then the next ones of all places at once (CTF, S065)."""

from __future__ import annotations

import numpy as np

from ar_jax.orders.protocol import Layout, Order, coordinates, one_grid, together


def coarse_to_fine(layout: Layout) -> Order:
    """The last axis of the grid counts the codes of a place: those of number 0 in raster order, then a step for each number.

    With two codes a place, a coarse label and the code itself, these are the two stages of arXiv:2503.16194, sec. 4.

    Args:
      layout: one grid, such as ((16, 16, 2),).
    """
    one_grid(layout, "coarse_to_fine")
    cells = coordinates(layout)
    number = cells[:, -1]
    first = np.cumsum(number == 0) - 1  # the step of each place's first code
    return together(np.where(number == 0, first, first.max(initial=0) + number), layout)
