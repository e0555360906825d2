"""Neighbourhood attention: its windows by their definition, its biases, and what a kernel of tiles gains by it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.analysis.tiles import count_tiles
from ar_jax.config import UsageError
from ar_jax.kernels.neighborhood import Neighborhood as Windows
from ar_jax.kernels.neighborhood import neighborhood_attention
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

WINDOWS = {
    "sliding": Windows((5, 6), (3, 3), (1, 1), (1, 1), (False, False)),
    "even and blocked": Windows((5, 6), (4, 2), (1, 2), (1, 1), (False, False)),
    "dilated": Windows((7, 6), (3, 2), (1, 1), (2, 3), (False, False)),
    "strided and causal": Windows((6, 5), (3, 3), (2, 3), (1, 1), (True, False)),
    "longer than the grid": Windows((3, 4), (7, 5), (1, 1), (1, 2), (False, False)),
    "volume": Windows((3, 2, 4), (2, 1, 3), (1, 1, 2), (1, 1, 1), (True, False, False)),
    "a line of each column": Windows((4, 3), (4, 1), (1, 1), (1, 1), (False, False)),
}
every_window = pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS.keys())


def read_along(windows: Windows, axis: int, place: int) -> set[int]:
    """The places of an axis that a place reads, by the words of the definition."""
    stride, dilation = windows.stride[axis], windows.dilation[axis]
    group = list(range(place % dilation, windows.grid[axis], dilation))
    index, size = group.index(place), min(windows.kernel_size[axis], len(group))
    sharing = [i for i in range(len(group)) if i // stride == index // stride]
    if windows.causal[axis]:
        return {group[i] for i in range(max(sharing[-1] - size + 1, 0), index + 1)}
    leader = min(sharing[0] + stride // 2, len(group) - 1)
    around = range(leader - size // 2, leader - size // 2 + size)
    shift = max(0, -around[0]) - max(0, around[-1] - len(group) + 1)  # pushed inwards, never shortened
    return {group[i + shift] for i in around}


def mask_of(windows: Windows) -> np.ndarray:
    """[places, places] bool, by the definition."""
    places = list(itertools.product(*map(range, windows.grid)))
    reads = [[read_along(windows, axis, i) for axis, i in enumerate(place)] for place in places]
    return np.asarray([[all(k in r for k, r in zip(key, read, strict=True)) for key in places] for read in reads])


def heads(grid: tuple[int, ...], seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, *grid, 2, 4))


def attended(windows: Windows, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention with the dense mask."""
    q, k, v = (a.reshape(2, -1, 2, 4) for a in (q, k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / 2
    weights = jax.nn.softmax(jnp.where(mask_of(windows)[None, None], logits, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(2, *windows.grid, 2, 4)


@every_window
@pytest.mark.parametrize("tiled", [False, True])
def test_a_place_reads_what_the_definition_says(windows: Windows, tiled: bool) -> None:
    q, k, v = (heads(windows.grid, seed) for seed in range(3))
    tile = (2,) * len(windows.grid) if tiled else None
    found = jax.jit(lambda *heads: neighborhood_attention(*heads, windows, tile=tile))(q, k, v)
    np.testing.assert_allclose(found, attended(windows, q, k, v), atol=1e-5)  # float32, sums of a few terms
    np.testing.assert_array_equal(windows.visible().dense()[0], mask_of(windows))


@every_window
def test_tokens_that_gather_their_windows_give_what_blocks_of_the_grid_give(windows: Windows) -> None:
    mixer = MIXERS["neighborhood"](
        embed_dim=8,
        num_heads=2,
        kernel_size=windows.kernel_size,
        stride=windows.stride,
        dilation=windows.dilation,
        causal_axes=windows.causal,
        grid=windows.grid,
    )
    x = jax.random.normal(jax.random.key(1), (2, *windows.grid, 8))
    params = jax.jit(lambda key, x: mixer.init(key, x, method="on_grid"))(jax.random.key(0), x)
    order = np.random.default_rng(0).permutation(math.prod(windows.grid))
    place = jnp.asarray(np.indices(windows.grid).reshape(len(windows.grid), -1).T[None, order], jnp.int32)
    tokens = Tokens(jnp.zeros(place.shape[:2], jnp.int32), place, len(order))

    @jax.jit
    def both(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = mixer.apply(params, x.reshape(2, -1, 8)[:, order], tokens)[0]
        return found, mixer.apply(params, x, method="on_grid").reshape(2, -1, 8)[:, order]

    found, whole = both(params, x)
    np.testing.assert_allclose(found, whole, atol=1e-5)  # float32, sums of a few terms


def test_a_bias_belongs_to_the_distance_on_the_grid() -> None:
    mixer = MIXERS["neighborhood"](embed_dim=4, num_heads=1, kernel_size=3, relative_bias=True, grid=(4, 4))
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 4))
    params = mixer.init(jax.random.key(0), x, method="on_grid")
    params["params"]["bias"] = jnp.zeros((1, 5, 5)).at[0, 2, 3].set(50.0)  # the right neighbour in the same row
    for name in ("value", "out"):
        params["params"][name] = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    found = mixer.apply(params, x, method="on_grid")
    np.testing.assert_allclose(found[:, :, :-1], x[:, :, 1:], atol=1e-5)  # exp(-50) of anything else


def test_a_prefix_is_read_by_all_and_reads_itself() -> None:
    mixer = MIXERS["neighborhood"](embed_dim=4, num_heads=1, kernel_size=1, grid=(3,), num_prefix=1)
    position, row = jnp.asarray([[[-1], [0], [1], [2]]]), jnp.arange(4, dtype=jnp.int32)[None]
    tokens, x = Tokens(row, position, 4, row=row), jax.random.normal(jax.random.key(1), (1, 4, 4))
    params = mixer.init(jax.random.key(0), x, tokens)
    reads = jax.jacobian(lambda x: mixer.apply(params, x, tokens)[0].sum(axis=(0, 2)))(x)
    seen = np.abs(reads[:, 0]).max(axis=-1) > 1e-6
    np.testing.assert_array_equal(seen, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])


@every_window
@pytest.mark.parametrize(("query_tile", "key_tile"), [(2, 2), (1, 3)])
def test_visited_tiles_are_those_in_which_something_is_read(windows: Windows, query_tile: int, key_tile: int) -> None:
    tiles = (query_tile,) * len(windows.grid), (key_tile,) * len(windows.grid)
    mask, orders = mask_of(windows), [windows.order(tile) for tile in tiles]
    sizes = [math.prod(tile) for tile in tiles]
    pairs = [
        mask[np.ix_(q, k)].any() for q in orders[0][0].reshape(-1, sizes[0]) for k in orders[1][0].reshape(-1, sizes[1])
    ]
    counted = count_tiles(windows, *tiles)
    assert (counted.total, counted.visited) == (len(pairs), sum(pairs))
    assert counted.ideal_speedup == pytest.approx(mask.size / mask.sum())


def test_blocked_windows_realise_all_of_their_speed_up_and_sliding_ones_do_not() -> None:
    grid, tile = (16, 16), (4, 4)
    plain = dict(grid=grid, kernel_size=(8, 8), dilation=(1, 1), causal=(False, False))
    blocked = count_tiles(Windows(**plain, stride=(8, 8)), tile, tile)
    sliding = count_tiles(Windows(**plain, stride=(1, 1)), tile, tile)
    assert blocked.ideal_speedup == sliding.ideal_speedup == 4
    assert blocked.block_sparse and blocked.speedup == 4
    assert not sliding.block_sparse and sliding.speedup < 3


def test_visited_tiles_grow_with_the_grid_and_not_with_its_square() -> None:
    def visited(side: int) -> int:
        return count_tiles(Windows((side, side), (8, 8), (4, 4), (1, 1), (False, False)), (4, 4), (4, 4)).visited

    assert visited(64) < 4.5 * visited(32)  # four times the places; the border's share shrinks


def test_lines_cost_as_much_as_their_length() -> None:
    """Axes of kernel size 1 are apart, so attention along a line of n of n x n places costs n^3 and not n^4."""

    def cost(side: int) -> int:
        windows = Windows((side, side), (1, side), (1, 1), (1, 1), (False, False))
        q = jax.ShapeDtypeStruct((1, side, side, 1, 8), jnp.float32)
        return flops(lambda q: neighborhood_attention(q, q, q, windows), q)

    assert math.log2(cost(128) / cost(64)) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(grid=()), "should be one value, or one for each axis of the grid"),
        (dict(kernel_size=(3,)), r"kernel_size=\(3,\) should be one value"),
        (dict(stride=4), "stride=4 must be at most kernel_size=3"),
        (dict(dilation=0), "dilation=0 must be at least 1"),
        (dict(num_heads=3), "num_heads=3 does not divide embed_dim=8"),
    ],
)
def test_windows_that_do_not_fit_are_told(fields: dict[str, object], message: str) -> None:
    mixer = MIXERS["neighborhood"](**{"embed_dim": 8, "num_heads": 2, "kernel_size": 3, "grid": (4, 4)} | fields)
    with pytest.raises(UsageError, match=message):
        mixer.init_state(1, 4, 1)


def test_a_tile_that_does_not_fit_is_told() -> None:
    with pytest.raises(UsageError, match=r"key_tile=\(2,\) should have a size of at least 1 on each axis"):
        count_tiles(WINDOWS["sliding"], (2, 2), (2,))
    with pytest.raises(ValueError, match="should be of the grid"):
        neighborhood_attention(*(heads((4, 4), 0),) * 3, WINDOWS["sliding"])
