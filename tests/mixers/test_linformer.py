"""Linformer: the equation, what is shared, and a sequence shorter than its table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

ROWS, LENGTH, DIM, HEADS, RANK = 9, 7, 8, 2, 3


def mixed(x: np.ndarray, **fields: Any) -> tuple[np.ndarray, Any]:
    index = jnp.arange(len(x), dtype=jnp.int32)[None]
    mixer = MIXERS["linformer"](embed_dim=DIM, num_rows=ROWS, **dict(num_heads=HEADS, rank=RANK) | fields)
    tokens = Tokens(index, index[..., None], len(x))
    run = jax.jit(lambda x: mixer.init_with_output(jax.random.key(0), x, tokens))
    (out, _), variables = run(jnp.asarray(x)[None])
    return np.asarray(out[0]), jax.tree.map(np.asarray, variables["params"])


@pytest.mark.parametrize(
    "shared", [(), ("share_heads",), ("share_projections",), ("share_values",), ("share_heads", "share_projections")]
)
def test_every_head_attends_to_projections_along_time(shared: tuple[str, ...]) -> None:
    x = np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)
    out, p = mixed(x, **{"share_heads": False} | dict.fromkeys(shared, True))
    assert p["key_projection"].shape == (ROWS, 1 if "share_heads" in shared else HEADS, RANK)
    assert ("value_projection" in p) == (not {"share_projections", "share_values"} & set(shared))
    assert ("value" in p) == ("share_values" not in shared)
    q, k = (x @ p[name]["kernel"] for name in ("query", "key"))
    v = k if "share_values" in shared else x @ p["value"]["kernel"]
    heads = []
    for head in range(HEADS):
        own = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        e, f = (p.get(name, p["key_projection"]) for name in ("key_projection", "value_projection"))
        e, f = (a[:LENGTH, min(head, a.shape[1] - 1)] for a in (e, f))
        logits = q[:, own] @ (e.T @ k[:, own]).T / (DIM // HEADS) ** 0.5
        weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        heads.append(weights @ (f.T @ v[:, own]))
    expected = np.concatenate(heads, axis=-1) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(out, expected, atol=1e-5)  # float32, sums of 8 terms


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=0), "rank=0 must be at least 1"),
        (dict(num_heads=3), "num_heads=3 does not divide embed_dim=8"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(np.zeros((LENGTH, DIM), np.float32), **fields)
