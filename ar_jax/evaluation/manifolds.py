"""Sets of features as manifolds: a ball around each vector that reaches its k-th nearest neighbour in the set.

    precision = the fraction of samples in the ball of any real image, recall the reverse, k = 3     (arXiv:1904.06991)
    density   = how many real images' balls a sample lies in, on average, over k, k = 5              (arXiv:2002.09797)
    coverage  = the fraction of real images whose ball holds a sample, k = 5

Distances are computed in tiles; the rows of a tile lie on all devices, its columns on each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.evaluation.batches import whole
from ar_jax.training.mesh import make_mesh
from ar_jax.training.sharding import batch_sharding, replicated

PRECISION_K, DENSITY_K = 3, 5
ROWS, COLUMNS = 512, 2048  # of a tile; the rows on one device


def manifold_metrics(real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage` of samples.

    A ball holds its border for precision and recall, and does not for density and coverage, as in the papers' own code.

    Args:
      real: [N, D] features of real images, N > 5.
      made: [M, D] features of samples, M > 3.
    """
    centre = real.mean(axis=0, dtype=np.float64)  # near 0, float32 has the digits that |x|^2 + |y|^2 - 2xy loses
    real, made = ((points - centre).astype(np.float32) for points in (real, made))
    around_real, _ = nearest(real, real, DENSITY_K, others=True)
    around_made, _ = nearest(made, made, PRECISION_K, others=True)
    inside_real, _ = held(made, real, around_real[:, PRECISION_K - 1])
    inside_made, _ = held(real, made, around_made[:, PRECISION_K - 1])
    _, balls = held(made, real, around_real[:, DENSITY_K - 1])
    to_made, _ = nearest(real, made, 1)
    return {
        "precision": float((inside_real > 0).mean()),
        "recall": float((inside_made > 0).mean()),
        "density": float(balls.mean() / DENSITY_K),
        "coverage": float((to_made[:, 0] < around_real[:, DENSITY_K - 1]).mean()),
    }


def nearest(rows: np.ndarray, columns: np.ndarray, k: int, others: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The k columns nearest to each row, the nearest first.

    Args:
      rows: [N, D] float32.
      columns: [M, D] float32.
      k: at most M, or M - 1 with `others`.
      others: row i is column i, and does not count as its own neighbour.

    Returns:
      Squared distances [N, k] float32 and the columns' numbers [N, k] int32.
    """
    tiles, valid = _tiles(columns)
    blocks = [
        _nearest(block, np.int32(first if others else -(2**30)), tiles, valid, k) for first, block in _blocks(rows)
    ]
    distances, indices = (np.concatenate([whole(b[i]) for b in blocks])[: len(rows)] for i in (0, 1))
    return distances, indices


def held(rows: np.ndarray, columns: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many columns' balls hold each row.

    Args:
      rows: [N, D] float32.
      columns: [M, D] float32.
      radii: [M] float32, squared.

    Returns:
      The number of balls with their borders [N] int32, and without them [N] int32.
    """
    (tiles, _), (reach, _) = _tiles(columns), _tiles(radii[:, None], blank=-1)  # no distance is below -1
    blocks = [_held(block, tiles, reach[..., 0]) for _, block in _blocks(rows)]
    closed, opened = (np.concatenate([whole(b[i]) for b in blocks])[: len(rows)] for i in (0, 1))
    return closed, opened


def _tiles(columns: np.ndarray, blank: float = 0.0) -> tuple[Array, Array]:
    """[M, D] as [tiles, COLUMNS or fewer, D], filled up, and which of them are columns; on each device."""
    size = min(COLUMNS, len(columns))
    count = -(-len(columns) // size)
    padded = np.full((count * size, *columns.shape[1:]), blank, np.float32)
    padded[: len(columns)] = columns
    valid = np.arange(count * size) < len(columns)
    placed: tuple[Array, Array] = jax.device_put(
        (padded.reshape(count, size, -1), valid.reshape(count, size)), replicated(make_mesh({"data": -1}))
    )
    return placed


def _blocks(rows: np.ndarray) -> Iterator[tuple[int, Array]]:
    """Blocks of rows of one shape, cut over all devices, each with the number of its first row."""
    mesh = make_mesh({"data": -1})
    size = min(ROWS, -(-len(rows) // mesh.devices.size)) * mesh.devices.size
    for first in range(0, len(rows), size):
        block = np.zeros((size, rows.shape[1]), np.float32)
        block[: len(rows) - first] = rows[first : first + size]
        yield first, jax.device_put(block, batch_sharding(mesh))


def _squared_distances(rows: Array, columns: Array) -> Array:
    """[N, D] and [M, D] to [N, M]."""
    cross = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.square(rows).sum(axis=1)[:, None] + jnp.square(columns).sum(axis=1)[None]
    return jnp.maximum(norms - 2 * cross, 0)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(rows: Array, first: Array, tiles: Array, valid: Array, k: int) -> tuple[Array, Array]:
    size, numbers = tiles.shape[1], jnp.arange(len(rows))

    def body(best: tuple[Array, Array], tile: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        start, columns, here = tile
        column = start + jnp.arange(size)
        usable = here[None] & (column[None] != (first + numbers)[:, None])
        distances = jnp.where(usable, _squared_distances(rows, columns), jnp.inf)
        both = jnp.concatenate([best[0], distances], axis=1)
        indices = jnp.concatenate([best[1], jnp.broadcast_to(column[None], distances.shape)], axis=1)
        values, places = jax.lax.top_k(-both, k)
        return (-values, jnp.take_along_axis(indices, places, axis=1)), None

    nothing = jnp.full((len(rows), k), jnp.inf), jnp.zeros((len(rows), k), jnp.int32)
    starts = size * jnp.arange(len(tiles), dtype=jnp.int32)
    return jax.lax.scan(body, nothing, (starts, tiles, valid))[0]


@jax.jit
def _held(rows: Array, tiles: Array, reach: Array) -> tuple[Array, Array]:
    def body(counts: tuple[Array, Array], tile: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        distances, radii = _squared_distances(rows, tile[0]), tile[1][None]
        closed, opened = counts
        return (closed + (distances <= radii).sum(axis=1), opened + (distances < radii).sum(axis=1)), None

    none = jnp.zeros(len(rows), jnp.int32)
    return jax.lax.scan(body, (none, none), (tiles, reach))[0]
