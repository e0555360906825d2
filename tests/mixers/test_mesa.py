"""MesaNet: the layer is its equation, and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

LENGTH, DIM, HEADS, WIDTH = 5, 8, 2, 4


def tokens_of(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def test_the_layer_is_its_equation() -> None:
    """Each token reads the ridge regression of all values so far on their keys, weighted and faded."""
    mixer = MIXERS["mesa"](embed_dim=DIM, num_heads=HEADS, head_dim=WIDTH, width=2, gate="silu")
    x = np.random.default_rng(0).normal(size=(1, LENGTH, DIM)).astype(np.float32)
    variables = jax.jit(lambda: mixer.init(jax.random.key(0), x, tokens_of(LENGTH)))()
    p = jax.tree.map(np.asarray, variables["params"])
    joined = np.concatenate([x[0] @ p[name]["kernel"] for name in ("query", "key")], axis=-1)
    filters = p["convolution"]["filters"]
    joined = filters[0] * joined + filters[1] * np.concatenate([np.zeros_like(joined[:1]), joined[:-1]])
    q, k = ((a * sigmoid(a)).reshape(LENGTH, HEADS, WIDTH) for a in np.split(joined, 2, axis=-1))
    q, k = (a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    v, gate = ((x[0] @ p[name]["kernel"]).reshape(LENGTH, HEADS, WIDTH) for name in ("value", "opening"))
    beta, keep = (sigmoid(x[0] @ p[name]["kernel"] + p[name]["bias"]) for name in ("beta", "decay"))
    ridge = np.log1p(np.exp(p["ridge"])) + 0.25
    np.testing.assert_allclose(ridge, 1, atol=1e-6)  # as it starts
    right = np.zeros((LENGTH, HEADS, WIDTH))
    for t in range(LENGTH):
        for n in range(HEADS):
            weight = beta[: t + 1, n] * [keep[j + 1 : t + 1, n].prod() for j in range(t + 1)]
            keys, values = k[: t + 1, n], v[: t + 1, n]
            system = (weight[:, None] * keys).T @ keys + np.diag(ridge[n])
            read = np.linalg.solve(system, (weight[:, None] * keys).T @ values).T @ q[t, n]
            right[t, n] = read / np.sqrt((read**2).mean() + 1e-5) * gate[t, n] * sigmoid(gate[t, n])
    found = jax.jit(lambda variables: mixer.apply(variables, x, tokens_of(LENGTH))[0])(variables)
    # Conjugate gradients stop at an error of 1e-4 or so of what is read, which the norm makes larger where it is small.
    np.testing.assert_allclose(found[0], right.reshape(LENGTH, -1) @ p["out"]["kernel"], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide embed_dim=8"),
        (dict(num_heads=2, num_iterations=0), "num_iterations=0 must be at least 1; None solves exactly"),
        (dict(num_heads=2, start="ones"), "model.mixer.start='ones' is unknown"),
        (dict(num_heads=2, ridge_floor=1.0), "ridge_floor=1.0 must lie in"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    mixer = MIXERS["mesa"](embed_dim=DIM, **options)
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.zeros((1, 2, DIM)), tokens_of(2)))
