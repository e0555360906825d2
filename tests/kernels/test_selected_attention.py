"""Attention to named blocks: every form gives the equation, and reads nothing that is not named."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels.selected_attention import FORMS, selected_attention
from ar_jax.kernels.selected_attention.pallas_tpu import named_first, pallas_tpu

# float32: sums of some hundred terms of order one. bfloat16 rounds weights and results by up to 1/256 of numbers up to 4.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def case(
    batch: int, queries: int, keys: int, heads: tuple[int, int, int], size: int, most: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Query heads, key heads, and heads that name blocks; blocks in any order, some of them none."""
    r = np.random.default_rng(0)
    shapes = {"q": (batch, queries, heads[0], 16), "k": (batch, keys, heads[1], 16), "v": (batch, keys, heads[1], 16)}
    arrays = {name: jnp.asarray(r.normal(size=shape), dtype) for name, shape in shapes.items()}
    rows = (batch, queries, heads[2])
    named = np.argsort(r.random((*rows, -(-keys // size))), axis=-1)[..., :most] * size
    named[r.random(named.shape) < 0.3] = -1
    named[-1, -1, -1] = -1  # this one reads nothing
    limit = r.integers(keys // 2, keys + 1, (batch, queries))
    return arrays | {"begin": jnp.asarray(named, jnp.int32), "limit": jnp.asarray(limit, jnp.int32)}


ROWS = [
    ((2, 1, 150, (4, 2, 2), 16, 5), "float32"),
    ((1, 3, 100, (4, 2, 4), 8, 4), "float32"),
    ((2, 1, 256, (8, 1, 1), 64, 4), "bfloat16"),
    ((1, 20, 96, (2, 2, 2), 8, 3), "float32"),  # too many queries for a kernel of few
]


@pytest.mark.parametrize(("shape", "dtype"), ROWS)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "reference"])
def test_every_form_gives_the_equation_and_its_gradient(
    form: str, shape: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pallas_tpu.__globals__, "FETCHED_KEYS", 2 * shape[4])  # several visits
    given = case(*shape, dtype)

    def loss(arrays: Any, implementation: str) -> tuple[jax.Array, Any]:
        options: dict[str, Any] = {"block_size": shape[4], "aligned": True, "implementation": implementation}
        out, lse = selected_attention(**given | arrays, **options)
        told = [out.astype(jnp.float32), jnp.where(lse > -1e29, lse, 0.0)]
        return sum((a * jnp.cos(jnp.arange(a.size)).reshape(a.shape)).sum() for a in told), (out, lse)

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    floats = {name: given[name] for name in "qkv"}
    found, expected = run(floats, form), run(floats, "reference")
    assert float(expected[1][1].min()) < -1e29  # where nothing is read
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "reference"])
def test_what_is_not_named_is_not_read(form: str) -> None:
    """Not a number times zero would be not a number."""
    given = case(1, 1, 160, (4, 2, 2), 16, 3)
    options: dict[str, Any] = {"block_size": 16, "aligned": True, "implementation": form}
    named = np.asarray(given["begin"])[0, 0, :, :, None] + np.arange(16)  # [K, M, 16]
    spoilt = {}
    for name in "kv":
        array = np.array(given[name])
        for head, own in enumerate(named):
            others = np.setdiff1d(
                np.arange(1, 160), own[own[:, 0] >= 0]
            )  # the first key stands in for what is not there
            array[0, others, head] = np.nan
        spoilt[name] = jnp.asarray(array)
    out, expected = (selected_attention(**given | arrays, **options)[0] for arrays in (spoilt, {}))
    np.testing.assert_array_equal(out, expected)


def fetched(blocks: list[int], slots: int) -> int:
    """How many blocks are brought: one whose number is that of the visit before, in its slot, is not fetched again."""
    visits = np.asarray(blocks).reshape(-1, slots)
    return slots + int((visits[1:] != visits[:-1]).sum())


def test_blocks_that_a_threshold_leaves_out_are_not_fetched_on_tpus() -> None:
    there = jnp.asarray([[False, True, False, True] + [False] * 12, [True] * 16])
    block, count = named_first(jnp.arange(16)[None].repeat(2, axis=0), there)
    assert count.tolist() == [2, 16]
    assert block[0].tolist() == [1, 3] + [3] * 14
    assert [fetched(row, 2) for row in block.tolist()] == [3, 16]


def test_an_unknown_form_is_told() -> None:
    with pytest.raises(ValueError, match="selected_attention has no implementation 'pallas'"):
        selected_attention(**case(1, 1, 32, (2, 2, 2), 8, 2), implementation="pallas")
