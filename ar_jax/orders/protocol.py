"""An order is data: in which step each token is generated, and where it lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.config import UsageError

Grid = tuple[int, ...]
Layout = tuple[
    Grid, ...
]  # one grid, or one per scale from coarse to fine; slots are numbered grid by grid, each in raster order


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """When each of L tokens is generated: tokens of one step are drawn together, given all tokens of earlier steps.

    Attributes:
      step: [L] int32, the step of slot i, every value of 0..num_steps-1 in use.
      position: [L, D] int32, where slot i lives: its coordinates on the grid; with several grids the index of the grid
        comes first and the coordinates count cells of the finest grid.
      shuffled: each example deals its slots anew, from a key, to steps of these same sizes.
      adaptive: which slots a step settles is decided by the model, by its confidence in them (MaskGIT) or by a policy of its own
        (LO-ARM); the sizes of the steps are kept.
      deal: how a shuffled order deals its slots: (key, which of them come first, [L] bool) to the slots of one example, [L]
        int32 in the order of their generation; None deals them evenly.
      patch: the sides of the patches that are filled one after the other; () where a place is a patch of its own.
      told: the tokens of the first step are given and never drawn, so that no network evaluation is spent on them.
      dealt: [B, L] int32, the slots of the examples at hand, in the order of their generation; None deals them by a key.
    """

    step: np.ndarray
    position: np.ndarray
    shuffled: bool = False
    adaptive: bool = False
    deal: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    patch: tuple[int, ...] = ()
    told: bool = False
    dealt: jax.Array | None = None

    def __post_init__(self) -> None:
        """Refuses steps with a gap: an empty step could not be sampled."""
        if len(self.step) != len(self.position) or min(self.sizes, default=0) < 1:
            raise ValueError(f"every step from 0 to {self.num_steps - 1} needs a token, and every token a position")

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.step)

    @property
    def num_steps(self) -> int:
        """The number of steps, which, but for one that is told, is the number of network evaluations of an example."""
        return int(self.step.max()) + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens each step generates."""
        return tuple(int(n) for n in np.bincount(self.step))

    def slots(self, key: jax.Array | None, batch_size: int, first: jax.Array | None = None) -> jax.Array:
        """The slots in the order of their generation.

        Args:
          key: draws the permutations of a shuffled order; others ignore it.
          batch_size: the number of examples, B.
          first: [B, L] bool, slots that a shuffled order puts in front; other orders keep theirs.

        Returns:
          [B, L] int32: entry k is the slot that is generated k-th; tokens of one step stand together.
        """
        if self.dealt is not None:
            return jnp.asarray(self.dealt, jnp.int32)
        if not self.shuffled:
            first = jnp.asarray(np.argsort(self.step, kind="stable"), jnp.int32)
            return jnp.broadcast_to(first, (batch_size, self.length))
        if key is None:
            raise ValueError("a shuffled order needs a key")
        if self.deal is None:
            return shuffled_slots(key, batch_size, self.length, first)
        first = jnp.zeros((batch_size, self.length), bool) if first is None else first
        return jax.vmap(self.deal)(jax.random.split(key, batch_size), first)


def shuffled_slots(key: jax.Array, batch_size: int, length: int, first: jax.Array | None = None) -> jax.Array:
    """A permutation of the slots per example, [B, L] int32, with the slots where first [B, L] is true in front."""
    rank = jax.random.uniform(key, (batch_size, length))
    return jnp.argsort(rank if first is None else rank - first, axis=-1).astype(jnp.int32)


def in_front(slots: jax.Array, first: jax.Array) -> jax.Array:
    """Slots [L] in an order, those where first [L] is true in front of the others."""
    return slots[jnp.argsort(~first[slots], stable=True)]


def coordinates(layout: Layout) -> np.ndarray:
    """[L, D] int32 coordinates of every slot; [L, 1 + D] with the grid's index in front if there are several grids."""
    if len(layout) == 1:
        return _cells(layout[0])
    finest = np.asarray(layout[-1])
    scaled = [_cells(grid) * finest // np.asarray(grid) for grid in layout]
    return np.concatenate([np.insert(cells, 0, scale, axis=1) for scale, cells in enumerate(scaled)]).astype(np.int32)


def _cells(grid: Grid) -> np.ndarray:
    return np.stack(np.unravel_index(np.arange(int(np.prod(grid))), grid), axis=-1).astype(np.int32)


def within(layout: Layout, region: np.ndarray) -> np.ndarray:
    """[L] bool, the slots whose cells lie wholly inside a region of the image: what in- and out-painting are given.

    Args:
      layout: grids of rows and columns, each laid over the whole image, and of frames before them; further axes (channels)
        are taken whole.
      region: [H, W] bool, or [T, H, W] of a video.

    Raises:
      UsageError: a grid without rows and columns, or finer than the region.
    """
    region, masks = np.asarray(region, bool), []
    for grid in layout:
        sides, further = grid[: region.ndim], grid[region.ndim :]
        if region.ndim < 2 or len(sides) != region.ndim or any(s > n for s, n in zip(sides, region.shape, strict=True)):
            raise UsageError(
                f"A region of shape {region.shape} does not tell which cells of the grid {grid} it covers; give [H, W]."
            )
        outside: np.ndarray = ~region  # of each cell, how many pixels are not in the region
        for axis, (side, size) in enumerate(zip(sides, region.shape, strict=True)):
            outside = np.moveaxis(np.tensordot(_bins(side, size), outside, axes=(1, axis)), 0, axis)
        masks.append(np.repeat((outside == 0).reshape(-1), int(np.prod(further))))
    return np.concatenate(masks)


def _bins(side: int, size: int) -> np.ndarray:
    """[side, size] int: which of `size` pixels each of `side` cells touches."""
    starts, ends = np.arange(side) * size // side, -(-np.arange(1, side + 1) * size // side)
    pixel = np.arange(size)
    return ((pixel >= starts[:, None]) & (pixel < ends[:, None])).astype(int)


def one_grid(layout: Layout, kind: str) -> Grid:
    """The layout's only grid; an order that walks one grid refuses a pyramid of them."""
    if len(layout) != 1:
        raise UsageError(
            f"order {kind!r} walks one grid, but the tokenizer gives {len(layout)}; use order 'next_scale' or one grid."
        )
    return layout[0]


def one_by_one(rank: np.ndarray, layout: Layout) -> Order:
    """The order that generates one token a step, slot i after all slots of smaller rank (ties in raster order)."""
    step = np.empty(len(rank), np.int32)
    step[np.argsort(rank, kind="stable")] = np.arange(len(rank))
    return Order(step, coordinates(layout))


def together(group: np.ndarray, layout: Layout) -> Order:
    """The order that generates all slots of equal group number in one step, groups in ascending order."""
    return Order(np.unique(group, return_inverse=True)[1].astype(np.int32), coordinates(layout))


def lexicographic(*keys: np.ndarray) -> np.ndarray:
    """[L] ranks that sort by the first key, then by the second, and so on; equal keys share a rank."""
    return np.unique(np.stack(keys, axis=-1), axis=0, return_inverse=True)[1].reshape(-1)


def expand(value: int | Sequence[int], num_axes: int, where: str) -> tuple[int, ...]:
    """A number for every axis: one number serves all of them."""
    values = (int(value),) * num_axes if isinstance(value, int | np.integer) else tuple(int(v) for v in value)
    if len(values) != num_axes:
        raise UsageError(f"{where}={values} needs {num_axes} numbers, one per axis of the grid.")
    return values
