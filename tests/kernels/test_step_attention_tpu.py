"""Step attention on TPUs: which blocks are visited, several blocks at a time, and caches, in pages or not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels.step_attention import (
    FORMS,
    Visibility,
    pallas_tpu_backward,
    pallas_tpu_blocks,
    pallas_tpu_decode,
    visibility,
)
from ar_jax.kernels.step_attention.paged import paged_attention
from ar_jax.kernels.step_attention.pallas_tpu_blocks import FIRST, LAST
from ar_jax.kernels.step_attention.reference import reference
from ar_jax.kernels.step_attention.visibility import EMPTY, FULL, MIXED, UNSEEN

pallas_tpu = FORMS["pallas_tpu"]
NEVER = 2**30
# float32: sums of some hundred terms of order one. bfloat16 keeps 8 bits: weights, results and their gradients each
# round by up to 1/256 of numbers up to 4.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}


@pytest.fixture(autouse=True)
def blocks_as_small_as_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu_blocks, "LARGEST_BLOCK", 128)
    monkeypatch.setattr(pallas_tpu_decode, "BLOCK_BYTES", 1)


def next_scale(length: int) -> np.ndarray:
    """The scale of each token of ten maps that grow to 16 x 16."""
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    return np.repeat(np.arange(10), [side * side for side in sides])[:length]


def masks(kind: str, queries: int, keys: int) -> dict[str, Any]:
    """The arguments of `visibility`."""
    r = np.random.default_rng(0)
    position = np.arange(max(queries, keys))
    steps = {
        "random": r.permutation(position),
        "next-scale": next_scale(len(position)),
        "block": position // 64,
        "strict": r.integers(0, 3, len(position)),
        "neighbourhood": np.zeros_like(position),
    }.get(kind, position)
    options: dict[str, Any] = {"strict": kind == "strict", "window": 30 if kind == "window" else None}
    if kind in ("strict", "next-scale"):
        steps = np.stack([steps, steps])  # a guidance pair: both alike
    if kind == "segments":
        options |= {"query_segment": position[None, :queries] // 70, "key_segment": position[None, :keys] // 70}
    if kind == "neighbourhood":
        place = np.stack([position // 20, position % 20], axis=-1)[None]
        options |= {"query_position": place[:, :queries], "key_position": place[:, :keys], "reach": ((2, 0), (3, 3))}
    steps = np.atleast_2d(steps)
    rows = {"query_step": steps[:, :queries], "key_step": steps[:, :keys]} | options
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.int32) if isinstance(a, np.ndarray) else a, rows)


def visited(visible: Visibility, block: int) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """The kinds of blocks from the dense mask, and the lists of visits."""
    queries, keys = visible.upper.shape[2], visible.key.shape[2]
    dense = np.asarray(visible.dense())
    dense = np.pad(dense, ((0, 0), (0, -queries % block), (0, -keys % block)))
    dense = dense.reshape(len(dense), dense.shape[1] // block, block, -1, block)
    kinds = np.where(dense.all(axis=(2, 4)), FULL, np.where(dense.any(axis=(2, 4)), MIXED, EMPTY))
    padded = pallas_tpu_blocks.padded(visible, block, block)
    visits, count = pallas_tpu_blocks.visits(padded.blocks(block, block))
    return kinds, np.asarray(count), [row[:n].tolist() for row, n in zip(np.asarray(visits), count, strict=True)]


@pytest.mark.parametrize("kind", ["raster", "random", "next-scale", "block"])
@pytest.mark.parametrize("block", [128, 256])
def test_visited_blocks_are_the_fewest_that_this_block_size_allows(kind: str, block: int) -> None:
    length = 680 if kind == "next-scale" else 1024
    visible = visibility(**masks(kind, length, length))
    kinds, count, lists = visited(visible, block)
    for example, visits in zip(kinds, lists, strict=True):
        assert len(visits) <= 1.05 * (example != EMPTY).sum()
        for visit in visits:
            assert example[visit >> 18, (visit >> 4) & 0x3FFF] == visit & 3  # FULL ones are known, too
    assert count.tolist() == [len(visits) for visits in lists]


def test_each_row_of_blocks_begins_and_ends_once_even_where_nothing_is_seen() -> None:
    kinds = jnp.asarray([[[MIXED, EMPTY, FULL], [EMPTY, EMPTY, EMPTY]], [[EMPTY, MIXED, EMPTY], [FULL, FULL, MIXED]]])
    visits, count = pallas_tpu_blocks.visits(kinds)
    told = [[(v >> 18, (v >> 4) & 0x3FFF, v & 12, v & 3) for v in row] for row in np.asarray(visits).tolist()]
    assert count.tolist() == [3, 4]
    assert told[0][:3] == [(0, 0, FIRST, MIXED), (0, 2, LAST, FULL), (1, 0, FIRST | LAST, EMPTY)]
    assert told[0][3:] == [(1, 0, 0, EMPTY)] * 3  # nothing is fetched, computed or written
    assert told[1][0] == (0, 1, FIRST | LAST, MIXED)
    assert [v[2] for v in told[1][1:4]] == [FIRST, 0, LAST]


@pytest.mark.parametrize("size", [128, 256, 384, 640, 1024])
def test_tiles_cover_a_block_in_whole_lanes(size: int) -> None:
    tiles = pallas_tpu_blocks.tiles(size)
    assert [tile.start for tile in tiles[1:]] + [size] == [tile.start + tile.size for tile in tiles]
    assert all(tile.size % 128 == 0 and tile.size <= 512 for tile in tiles)


def arrays(batch: int, queries: int, keys: int, heads: tuple[int, int], dim: int, dtype: str) -> dict[str, Any]:
    r = np.random.default_rng(1)
    shapes = {
        "q": (batch, queries, heads[0], dim),
        "k": (batch, keys, heads[1], dim),
        "v": (batch, keys, heads[1], dim),
    }
    return {name: jnp.asarray(r.normal(size=shape), dtype) for name, shape in shapes.items()}


def compare(inputs: dict[str, Any], visible: Visibility, soft_cap: float | None, dtype: str) -> None:
    """Values and gradients by every input, those of the reference."""
    inputs = {"bias": None, "sinks": None} | inputs

    def loss(inputs: dict[str, Any], form: Any) -> tuple[jax.Array, Any]:
        out, lse = form(**inputs, visible=visible, scale=0.25, soft_cap=soft_cap)
        summed = [out.astype(jnp.float32), jnp.where(lse > UNSEEN / 2, lse, 0.0)]
        return sum((a * jnp.cos(jnp.arange(a.size)).reshape(a.shape)).sum() for a in summed), (out, lse)

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    given, expected = run(inputs, pallas_tpu), run(inputs, reference)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# Batch, queries, keys, heads and key heads, width: odd lengths, widths that are no multiple of a tile, several blocks.
CASES = [
    ("raster", (1, 200, 200, (1, 1), 32), (), None, "float32"),
    ("random", (2, 150, 130, (2, 1), 40), ("sinks",), 3.0, "float32"),
    ("next-scale", (2, 150, 150, (2, 2), 16), (), None, "bfloat16"),
    ("strict", (2, 130, 200, (2, 1), 16), ("bias",), 2.0, "float32"),
    ("window", (1, 290, 290, (1, 1), 16), (), None, "float32"),
    ("segments", (2, 140, 140, (1, 1), 16), ("bias", "sinks"), None, "bfloat16"),
    ("neighbourhood", (1, 300, 300, (1, 1), 16), (), None, "float32"),
]


@pytest.mark.parametrize("kind, shape, more, soft_cap, dtype", CASES)
def test_several_blocks_give_what_the_definition_gives(
    kind: str, shape: tuple[Any, ...], more: tuple[str, ...], soft_cap: float | None, dtype: str
) -> None:
    inputs = arrays(*shape, dtype)
    batch, queries, keys, (heads, _), _ = shape
    r = np.random.default_rng(2)
    if "bias" in more:
        inputs["bias"] = jnp.asarray(r.normal(size=(1, heads, queries, keys)), jnp.float32)
    if "sinks" in more:
        inputs["sinks"] = jnp.asarray(r.normal(size=(heads,)), jnp.float32)
    compare(inputs, visibility(**masks(kind, queries, keys)), soft_cap, dtype)


def test_queries_taken_in_parts_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu_backward, "QUERY_BYTES", 4 * 128 * 100)
    compare(arrays(1, 150, 130, (2, 1), 16, "float32"), visibility(**masks("random", 150, 130)), None, "float32")


def test_blocks_that_nobody_sees_are_not_read() -> None:
    """Not a number times zero would be not a number."""
    inputs = arrays(1, 150, 300, (1, 1), 16, "float32")
    visible = visibility(jnp.arange(150)[None], jnp.arange(300)[None])
    spoilt = {name: inputs[name].at[:, 256:].set(jnp.nan) for name in "kv"}
    run = lambda given: pallas_tpu(**inputs | given, visible=visible, bias=None, sinks=None, scale=1.0, soft_cap=None)  # noqa: E731
    np.testing.assert_array_equal(run(spoilt)[0], run({})[0])


@pytest.mark.parametrize(
    "shape, window, dtype",
    [
        ((2, 1, 300, (4, 2), 32), None, "float32"),
        ((3, 4, 512, (6, 1), 64), None, "bfloat16"),
        ((2, 3, 256, (3, 3), 40), 100, "float32"),
    ],
)
def test_a_cache_is_read_as_far_as_it_is_filled(shape: tuple[Any, ...], window: int | None, dtype: str) -> None:
    batch, queries, keys, heads, dim = shape
    inputs = arrays(batch, queries, keys, heads, dim, dtype)
    filled = jnp.asarray([queries, 120, 128][:batch])[:, None]
    place = jnp.arange(keys)[None]
    key_step = jnp.where(place < filled, place, NEVER)
    visible = visibility(filled - queries + jnp.arange(queries)[None], key_step, window=window)
    inputs["sinks"] = jnp.linspace(-1.0, 1.0, heads[0])
    assert pallas_tpu_decode.decodes(inputs["q"], None)
    compare(inputs, visible, 3.0, dtype)
    spoilt = {name: inputs[name].at[:, 128:].set(jnp.nan) for name in "kv"}
    out, _ = pallas_tpu(**inputs | spoilt, visible=visible, bias=None, scale=1.0, soft_cap=None)
    assert jnp.isfinite(out.astype(jnp.float32)).all()


@pytest.mark.parametrize(
    "queries, heads, page, window, dtype",
    [(1, (4, 2), 16, None, "float32"), (3, (4, 1), 8, 40, "bfloat16"), (20, (2, 2), 16, None, "float32")],
)
def test_pages_are_read_where_the_table_says(
    queries: int, heads: tuple[int, int], page: int, window: int | None, dtype: str
) -> None:
    pages, dim, lengths = 20, 16, np.asarray([0, 2, 75, 20 * page])
    r = np.random.default_rng(0)
    pool = {n: r.normal(size=(4 * pages + 3, page, heads[1], dim)) for n in ("k_pages", "v_pages")}
    table = r.permutation(4 * pages + 3)[: 4 * pages].reshape(4, pages)
    for i, length in enumerate(lengths):
        used = -(-length // page)
        for a in pool.values():
            a[table[i, used:]] = 0 if queries > 16 else np.nan  # many queries are served by gathering
        table[i, used:] = -1
    inputs = {name: jnp.asarray(a, dtype) for name, a in pool.items()}
    inputs |= {"page_table": jnp.asarray(table, jnp.int32), "lengths": jnp.asarray(lengths, jnp.int32)}
    q = jnp.asarray(r.normal(size=(4, queries, heads[0], dim)), dtype)
    clean = inputs | {name: jnp.nan_to_num(inputs[name]) for name in pool}

    def run(inputs: dict[str, Any], implementation: str) -> Any:
        options = {"window": window, "logit_soft_cap": 4.0, "return_lse": True, "implementation": implementation}
        return jax.jit(lambda inputs: paged_attention(q, **inputs, **options))(inputs)

    given, expected = run(inputs, "pallas_tpu"), run(clean, "reference")
    for a, b in zip(given, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_pages_that_are_not_read_are_replaced_by_what_their_slot_read_before() -> None:
    table = jnp.arange(10)[None]
    read = (table >= 3) & (table < 7)
    assert pallas_tpu_decode.fetched(table, read, 4).tolist() == [[4, 5, 6, 3, 4, 5, 6, 3, 4, 5]]
    nothing = jnp.zeros_like(read)
    assert set(pallas_tpu_decode.fetched(table, nothing, 4).reshape(-1).tolist()) == {0}


def test_shapes_that_do_not_fit_are_told() -> None:
    q, pages, table, lengths = (
        jnp.zeros((2, 1, 4, 8)),
        jnp.zeros((9, 16, 2, 8)),
        jnp.zeros((2, 4), int),
        jnp.zeros(2, int),
    )
    with pytest.raises(ValueError, match=r"k_pages \(9, 16, 2, 8\).* with N a multiple of K"):
        paged_attention(q[:, :, :3], pages, pages, table, lengths)
    with pytest.raises(ValueError, match=r"page_table \(1, 4\) int32 should be int32 \[2, max_pages\]"):
        paged_attention(q, pages, pages, table[:1], lengths)
    with pytest.raises(ValueError, match=r"lengths \(2, 1\) int32 should be int32 \[2\]"):
        paged_attention(q, pages, pages, table, lengths[:, None])


def test_it_runs_mapped_over_examples_with_steps_of_their_own() -> None:
    inputs = arrays(2, 20, 20, (1, 1), 16, "float32")
    steps = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 20)))

    def one(q: jax.Array, k: jax.Array, v: jax.Array, step: jax.Array) -> jax.Array:
        mine = (a[None] for a in (q, k, v))
        return pallas_tpu(*mine, visibility(step[None], step[None]), None, None, scale=1.0, soft_cap=None)[0][0]

    whole = pallas_tpu(**inputs, visible=visibility(steps, steps), bias=None, sinks=None, scale=1.0, soft_cap=None)[0]
    mapped = jax.vmap(one)(inputs["q"], inputs["k"], inputs["v"], steps)
    np.testing.assert_allclose(mapped, whole, atol=1e-6)  # the same sums in the same order
