"""Linformer: the equation, what is shared, and a sequence shorter than its table."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack, mixer_pattern

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


def test_layers_may_share_the_first_ones_projections() -> None:
    """Layerwise sharing (sec. 4): whatever the later layers' own projections are."""
    fields = dict(kind="linformer", num_heads=HEADS, rank=RANK, share_projections=True, num_rows=ROWS)
    stacks = [
        Stack(mixer_pattern(fields | dict(share_layers=on), embed_dim=DIM), 3, BlockOptions(mlp_dim=8))
        for on in (True, False)
    ]
    index = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    tokens, x = Tokens(index, index[..., None], LENGTH), jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
    params = cases.away_from_zero(jax.eval_shape(lambda: stacks[0].init(jax.random.key(0), x, tokens)), seed=1)
    tables = params["params"]["layers"]["block_0"]["mixer"]["key_projection"]
    same = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape) if a is tables else a, params)
    shared, alone, own = (
        jax.jit(s.apply)(p, x, tokens)[0] for s, p in zip((*stacks, stacks[1]), (params, same, params), strict=True)
    )
    np.testing.assert_allclose(shared, alone, atol=1e-5)  # float32, three layers
    assert float(jnp.abs(shared - own).max()) > 0.01
    with pytest.raises(UsageError, match="share_layers=True needs config.model.kind='decoder'"):
        mixed(np.zeros((LENGTH, DIM), np.float32), share_layers=True)


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
