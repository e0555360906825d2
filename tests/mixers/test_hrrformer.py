"""Hrrformer: binding and unbinding by the definition of circular convolution, and a sequence of 131,072 tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import NEVER, Tokens

LENGTH, DIM, HEADS = 6, 8, 2


def mixed(x: np.ndarray, kept: int = LENGTH, **fields: Any) -> tuple[np.ndarray, Any]:
    index = jnp.arange(len(x), dtype=jnp.int32)[None]
    tokens = Tokens(jnp.where(index < kept, index, NEVER), index[..., None], len(x), padded=kept < len(x))
    mixer = MIXERS["hrrformer"](**dict(embed_dim=DIM, num_heads=HEADS) | fields)
    run = jax.jit(lambda x: mixer.init_with_output(jax.random.key(0), x, tokens))
    (out, _), variables = run(jnp.asarray(x)[None])
    return np.asarray(out[0]), jax.tree.map(np.asarray, variables["params"])


def bind(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Circular convolution."""
    size = len(a)
    return np.asarray([sum(a[j] * b[(i - j) % size] for j in range(size)) for i in range(size)])


@pytest.mark.parametrize("binds_padding", [False, True])
def test_each_value_is_weighed_by_how_well_it_is_recalled(binds_padding: bool) -> None:
    kept = 4
    x = np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)
    out, p = mixed(x, kept, binds_padding=binds_padding)
    heads = []
    for head in range(HEADS):
        own = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        q, k, v = (x @ p[name]["kernel"][:, own] for name in ("query", "key", "value"))
        memory = sum(bind(k[s], v[s]) for s in range(LENGTH if binds_padding else kept))
        recalled = [bind(np.roll(q[t][::-1], 1), memory) for t in range(kept)]
        cosine = [v[t] @ r / np.linalg.norm(v[t]) / np.linalg.norm(r) for t, r in enumerate(recalled)]
        weights = np.exp(cosine) / np.exp(cosine).sum()
        heads.append(weights[:, None] * v[:kept])
    np.testing.assert_allclose(out[:kept], np.concatenate(heads, axis=-1) @ p["out"]["kernel"], atol=1e-5)  # float32


def test_a_hundred_thousand_tokens_are_read_at_once() -> None:
    length = 131_072
    x = np.random.default_rng(1).normal(size=(length, DIM)).astype(np.float32)
    out, _ = mixed(x, length)
    assert out.shape == (length, DIM) and np.isfinite(out).all() and out.any()


def test_heads_that_do_not_divide_the_width_are_told() -> None:
    with pytest.raises(UsageError, match="num_heads=3 does not divide embed_dim=8"):
        mixed(np.zeros((LENGTH, DIM), np.float32), num_heads=3)
