"""CHELA: its equation, step by step, and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

LENGTH, DIM, HEADS, Z, V = 7, 3, 2, 4, 6


def mixed(x: np.ndarray, **fields: Any) -> tuple[np.ndarray, Any]:
    index = jnp.arange(len(x), dtype=jnp.int32)[None]
    mixer = MIXERS["chela"](
        **dict(embed_dim=DIM, num_heads=HEADS, z_dim=Z, v_dim=V, short_width=2, long_width=4) | fields
    )
    tokens = Tokens(index, index[..., None], len(x))
    run = jax.jit(lambda x: mixer.init_with_output(jax.random.key(0), x, tokens))
    (out, _), variables = run(jnp.asarray(x)[None])
    return np.asarray(out[0]), jax.tree.map(np.asarray, variables["params"])


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def convolved(x: np.ndarray, filters: np.ndarray) -> np.ndarray:
    return np.stack([sum(filters[j] * x[t - j] for j in range(len(filters)) if t >= j) for t in range(len(x))])


def test_linear_attention_reads_short_and_long_convolutions() -> None:
    x = np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)
    out, p = mixed(x)
    c = silu(convolved(silu(convolved(x, p["short"])), p["long"]))
    z, v = silu(c @ p["shared"]["kernel"]), silu(x @ p["value"]["kernel"])
    q, k = (z * p["scales"][i] + p["offsets"][i] for i in (0, 1))
    q, k, v = (a.reshape(LENGTH, HEADS, -1) for a in (q, k, v))
    scores = np.tril(np.einsum("tnz,snz->nts", q, k) * (Z // HEADS) ** -0.5)
    read = np.einsum("nts,snh->tnh", scores, v)
    read = read / np.sqrt(np.square(read).mean(axis=-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    expected = (read.reshape(LENGTH, V) * silu(c @ p["gate"]["kernel"])) @ p["out"]["kernel"]
    np.testing.assert_allclose(out, expected, atol=1e-4)  # float32, and a norm of small numbers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide z_dim=4"),
        (dict(v_dim=5), "num_heads=2 does not divide value_dim=5"),
        (dict(long_width=1), "long_width=1 must be at least 2"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(np.zeros((LENGTH, DIM), np.float32), **fields)
