"""SparseK attention: its equation, its bounded set, straight-through gradients, and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

DIM, LENGTH, KEYS, WINDOW = 8, 70, 3, 2
bare: dict[str, Any] = dict(embed_dim=DIM, num_heads=1, num_keys=KEYS, window=WINDOW, rope_base=0)
x = jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
index = jnp.arange(LENGTH, dtype=jnp.int32)[None]
tokens = Tokens(index, index[..., None], LENGTH)


def projected(u: np.ndarray) -> np.ndarray:
    """The nearest point of the hypersimplex, by bisection."""
    low, high = u.min() - 1, u.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(u - middle, 0, 1).sum() > KEYS else (low, middle)
    return np.clip(u - low, 0, 1) if len(u) > KEYS else np.ones_like(u)


def run(**fields: Any) -> tuple[np.ndarray, Any]:
    mixer = MIXERS["sparsek"](**bare | fields)
    (out, _), variables = jax.jit(lambda x: mixer.init_with_output(jax.random.key(1), x, tokens))(x)
    return np.asarray(out[0]), variables["params"]


@pytest.mark.parametrize("capacity", [4, 70])
@pytest.mark.parametrize("gates", ["soft", "straight_through"])
def test_each_token_reads_its_window_and_its_share_of_the_best(gates: str, capacity: int) -> None:
    out, params = run(gates=gates, capacity=capacity)
    q, k, v, u = (np.asarray(x[0] @ params[n]["kernel"], np.float64) for n in ("query", "key", "value", "score"))
    for t in range(LENGTH):
        gate = np.zeros(t + 1)
        old = max(t + 1 - WINDOW, 0)
        best = np.argsort(-u[:old, 0])[:capacity]
        if old:
            share = projected(u[best, 0])
            gate[best] = share > 0 if gates == "straight_through" else share
        gate[old:] = 1
        weight = np.exp(gate * (k[: t + 1] @ q[t]) / np.sqrt(DIM)) * (gate > 0)
        expected = (weight / weight.sum() * gate) @ v[: t + 1] @ params["out"]["kernel"]
        np.testing.assert_allclose(out[t], expected, atol=1e-5)  # float32, sums of 70 terms of order one


def test_straight_through_gates_have_the_gradient_of_the_soft_ones() -> None:
    """With the capacity so small that all that is left is read in full, only the gradient tells them apart."""
    mixer = MIXERS["sparsek"](**bare, gates="straight_through")
    short, few = x[:, :9], tokens.part(slice(9))
    params = jax.jit(lambda: mixer.init(jax.random.key(1), short, few))()
    gradient = jax.jit(jax.grad(lambda p: jnp.square(mixer.apply(p, short, few)[0]).sum()))(params)
    assert np.abs(gradient["params"]["score"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=3), "must divide num_heads=3"),
        (dict(num_keys=9, capacity=4), "num_keys=9 must be at least 1 and at most capacity=4"),
        (dict(window=0), "window=0 at least 1"),
        (dict(gates="hard"), "gates='hard' is unknown"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(**fields)
