"""Neighbourhood attention on grids of any number of axes (arXiv:2204.07143), with strides and dilation (arXiv:2504.16922)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.kernels.step_attention import Visibility, step_attention, visibility

FAR = 2**28  # more than any coordinate


@dataclasses.dataclass(frozen=True)
class Neighborhood:
    """Which places of a grid each place reads: along every axis a window, and of these the product.

    An axis falls into `dilation` groups of every so-manieth place. Inside a group of L places, place i belongs to the
    stride group i // stride, which shares the window of its leader: `kernel_size` places around it, pushed inwards at the
    borders and never shortened. On a causal axis the window ends with place i itself, and starts where that of the stride
    group's last place does.

    stride = 1 slides, stride = kernel_size is blocked attention, what lies between is strided.

    Attributes:
      grid: the length of each axis.
      kernel_size: of each axis; an axis that is shorter is read whole.
      stride: of each axis, at most its kernel_size.
      dilation: of each axis.
      causal: of each axis.
    """

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    def window(self, axis: int, place: Any) -> tuple[Any, Any, Any]:
        """The group of each place of an axis, and the first and last place of its window, counted inside the group.

        Args:
          axis: of the grid.
          place: integers, a numpy or JAX array.
        """
        xp = np if isinstance(place, np.ndarray) else jnp
        stride, dilation = self.stride[axis], self.dilation[axis]
        group, index = place % dilation, place // dilation
        length = (self.grid[axis] - group + dilation - 1) // dilation
        kernel = xp.minimum(self.kernel_size[axis], length)
        start = index // stride * stride
        if self.causal[axis]:
            leader = xp.minimum(start + stride - 1, length - 1)
            return group, xp.maximum(leader - kernel + 1, 0), index
        leader = xp.minimum(start + stride // 2, length - 1)
        first = xp.clip(leader - kernel // 2, 0, length - kernel)
        return group, first, first + kernel - 1

    def reads(self, axis: int) -> int:
        """The most places that a place reads along an axis."""
        return min(self.kernel_size[axis], -(-self.grid[axis] // self.dilation[axis]))

    def order(self, tile: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The places, counted in raster order, so that those of a tile stand together.

        Args:
          tile: the shape of a tile, inside one dilation group; None takes the raster order as it is.

        Returns:
          The places, and which of them are no repetitions of another, which fill up the tiles at the borders.
        """
        if tile is None:
            return np.arange(math.prod(self.grid)), np.ones(math.prod(self.grid), bool)
        places: Any
        real: Any
        places, real, split = np.zeros((), int), np.ones((), bool), list[int]()
        for length, dilation, size in zip(self.grid, self.dilation, tile, strict=True):
            groups = [np.arange(g, length, dilation) for g in range(min(dilation, length))]
            line = np.concatenate([np.pad(g, (0, -len(g) % size), "edge") for g in groups])
            first = np.concatenate([np.arange(len(g) + -len(g) % size) < len(g) for g in groups])
            places, real = places[..., None] * length + line, real[..., None] & first
            split += [len(line) // size, size]
        tiles_first = [*range(0, len(split), 2), *range(1, len(split), 2)]
        places, real = (a.reshape(split).transpose(tiles_first).reshape(-1) for a in (places, real))
        return places, real

    def bounds(self, query_tile: tuple[int, ...] | None, key_tile: tuple[int, ...] | None) -> dict[str, Any]:
        """Who reads whom as arguments of `step_attention`, with queries and keys in the order of these tiles."""
        (queries, _), (keys, real) = self.order(query_tile), self.order(key_tile)
        query, key = (np.unravel_index(places, self.grid) for places in (queries, keys))
        centre, index, reach = list[Any](), list[Any](), list[tuple[int, int]]()
        query_group, key_group = np.zeros(len(queries), int), np.zeros(len(keys), int)
        for axis, dilation in enumerate(self.dilation):
            group, first, last = self.window(axis, np.asarray(query[axis]))
            query_group, key_group = query_group * dilation + group, key_group * dilation + key[axis] % dilation
            size = int(last[0] - first[0])
            if (last - first == size).all():
                centre, index, reach = [*centre, first], [*index, key[axis] // dilation], [*reach, (0, size)]
            else:  # windows of several lengths: each end is a bound of its own
                centre, index = [*centre, first, last], [*index, key[axis] // dilation, key[axis] // dilation]
                reach += [(0, FAR), (FAR, 0)]
        arrays = {
            "query_step": np.zeros(len(queries)),
            "key_step": np.where(real, 0, 1),  # repetitions are too late for all
            "query_position": np.stack(centre, axis=-1),
            "key_position": np.stack(index, axis=-1),
        }
        if max(self.dilation) > 1:
            arrays |= {"query_segment": query_group, "key_segment": key_group}
        return {name: a.astype(np.int32) for name, a in arrays.items()} | {"reach": tuple(reach)}

    def visible(self, query_tile: tuple[int, ...] | None = None, key_tile: tuple[int, ...] | None = None) -> Visibility:
        """Who reads whom, as the forms of `step_attention` take it."""
        bounds = self.bounds(query_tile, key_tile)
        reach = bounds.pop("reach")
        arrays: dict[str, Any] = {name: jnp.asarray(a)[None] for name, a in bounds.items()}
        return visibility(**arrays, reach=reach)


def neighborhood_attention(
    q: Array,
    k: Array,
    v: Array,
    neighborhood: Neighborhood,
    *,
    tile: tuple[int, ...] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention of each place to its neighbourhood; see `Neighborhood` and `step_attention`.

    Axes of kernel size 1 are so many grids on their own, and cost no more than that; on the others, blocks of keys that no
    query of a block reads are left out. With tiles, blocks are compact on the grid and more of them are.

    Args:
      q: [B, *grid, N, H].
      k: [B, *grid, K, H], where N is a multiple of K.
      v: [B, *grid, K, H].
      neighborhood: who reads whom.
      tile: the shape in which places are blocked; None leaves rows as they are.
      scale: 1 / sqrt(H) if None.
      return_lse: also return the log-sum-exp of the logits.
      implementation: a key of step_attention's FORMS.

    Returns:
      [B, *grid, N, H] in v's dtype; with return_lse also [B, *grid, N] float32.

    Raises:
      ValueError: arrays of another grid, or a tile of another number of axes.
    """
    grid = neighborhood.grid
    if any(a.shape[1:-2] != grid for a in (q, k, v)) or (tile is not None and len(tile) != len(grid)):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} and tile {tile} should be of the grid {grid}")
    alone = [a for a, size in enumerate(neighborhood.kernel_size) if size == 1]
    alone = alone[:-1] if len(alone) == len(grid) else alone  # something must be left
    axes = [a for a in range(len(grid)) if a not in alone]
    inner = Neighborhood(*(tuple(field[a] for a in axes) for field in dataclasses.astuple(neighborhood)))
    inner_tile = None if tile is None else tuple(tile[a] for a in axes)
    places, real = inner.order(inner_tile)
    back = np.flatnonzero(real)[np.argsort(places[real])]
    plain = tile is None

    def lines(a: Array) -> Array:
        a = jnp.moveaxis(a, [1 + axis for axis in alone], range(1, 1 + len(alone)))
        a = a.reshape(-1, math.prod(inner.grid), *a.shape[-2:])
        return a if plain else jnp.take(a, places, axis=1)

    def whole(a: Array) -> Array:
        a = a if plain else jnp.take(a, back, axis=1)
        a = a.reshape(len(q), *(grid[axis] for axis in alone), *inner.grid, *a.shape[2:])
        return jnp.moveaxis(a, range(1, 1 + len(alone)), [1 + axis for axis in alone])

    out, lse = step_attention(
        lines(q),
        lines(k),
        lines(v),
        **inner.bounds(inner_tile, inner_tile),
        scale=scale,
        return_lse=True,
        implementation=implementation,
    )
    return (whole(out), whole(lse)) if return_lse else whole(out)
