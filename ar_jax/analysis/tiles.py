"""What sparsity is worth on hardware that works tile by tile: the simulator of GNA (arXiv:2504.16922, sec. 3)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ar_jax.config import UsageError
from ar_jax.kernels.neighborhood import Neighborhood
from ar_jax.kernels.step_attention.visibility import EMPTY, FULL


@dataclasses.dataclass(frozen=True)
class TileCount:
    """Pairs of a tile of queries and a tile of keys.

    Attributes:
      total: all pairs, which attention without a mask visits.
      visited: those in which some query reads some key, which a block-sparse kernel visits.
      full: those of them in which every query reads every key, where no mask is needed.
      ideal_speedup: pairs of places over those that read one another, the bound by FLOPs.
    """

    total: int
    visited: int
    full: int
    ideal_speedup: float

    @property
    def speedup(self) -> float:
        """The bound that a kernel of such tiles can come up to, over attention without a mask."""
        return self.total / self.visited

    @property
    def block_sparse(self) -> bool:
        """Whether no visited tile is masked in part, so that the whole of the ideal speed-up is within reach."""
        return self.visited == self.full


def count_tiles(neighborhood: Neighborhood, query_tile: tuple[int, ...], key_tile: tuple[int, ...]) -> TileCount:
    """Counts the tiles that neighbourhood attention visits, by the rule by which the kernels skip blocks.

    Args:
      neighborhood: who reads whom.
      query_tile: the shape on the grid of a tile of queries.
      key_tile: the shape of a tile of keys.

    Raises:
      UsageError: a tile of another number of axes, or with an axis below 1.
    """
    for name, tile in (("query_tile", query_tile), ("key_tile", key_tile)):
        if len(tile) != len(neighborhood.grid) or min(tile) < 1:
            raise UsageError(f"{name}={tile} should have a size of at least 1 on each axis of {neighborhood.grid}.")
    visible = neighborhood.visible(query_tile, key_tile)
    kinds = np.asarray(visible.blocks(math.prod(query_tile), math.prod(key_tile)))
    pairs = 1
    for axis, length in enumerate(neighborhood.grid):
        _, first, last = neighborhood.window(axis, np.arange(length))
        pairs *= int((last - first + 1).sum())
    total = math.prod(neighborhood.grid) ** 2
    return TileCount(kinds.size, int((kinds != EMPTY).sum()), int((kinds == FULL).sum()), total / pairs)
