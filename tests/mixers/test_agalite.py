"""AGaLiTe: its few vectors stand for a memory of outer products, the better the more waves there are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.agalite import cosines
from ar_jax.mixers.protocol import Tokens

LENGTH, DIM = 12, 6


def test_with_many_waves_it_is_gated_attention_over_outer_products() -> None:
    """One head: out_t = sum_j v_j (k_j . q_t), each as faded since, over 4 s_t . q_t; the error falls with the waves."""
    index = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    x, tokens = jax.random.normal(jax.random.key(0), (1, LENGTH, DIM)), Tokens(index, index[..., None], LENGTH)
    mixers = {waves: MIXERS["agalite"](DIM, num_heads=1, expansion=2, num_waves=waves) for waves in (17, 257)}
    variables = jax.jit(lambda: mixers[17].init(jax.random.key(1), x, tokens))()  # waves have no parameters
    p = {name: np.asarray(x[0] @ w["kernel"]) for name, w in variables["params"].items() if name != "out"}

    def product(act, wide, spread):
        return np.asarray(act(p[spread])[:, :, None] * act(p[wide])[:, None]).reshape(LENGTH, -1)

    k, q = (product(jax.nn.relu, name, f"{name}_spread") for name in ("key", "query"))
    gate, value_gate = product(jax.nn.sigmoid, "key_gate", "gate_spread"), np.asarray(jax.nn.sigmoid(p["value_gate"]))
    memory, total, exact = np.zeros((DIM, 2 * DIM)), np.zeros(2 * DIM), []
    for t in range(LENGTH):
        memory = memory * np.outer(1 - value_gate[t], 1 - gate[t])
        memory += np.outer(value_gate[t] * p["value"][t], gate[t] * k[t])
        total = (1 - gate[t]) * total + gate[t] * k[t]
        weight = max(4 * total @ q[t], 1e-6)  # nothing is read by a query of zeros
        exact.append(memory @ q[t] / weight @ np.asarray(variables["params"]["out"]["kernel"]))
    found = [jax.jit(lambda x, m=m: m.apply(variables, x, tokens)[0][0])(x) for m in mixers.values()]
    errors = [float(np.abs(out - np.asarray(exact)).max()) for out in found]
    assert errors[1] < errors[0] / 8 and errors[1] < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("waves", [1, 2, 5])
def test_waves_are_exact_for_any_time(waves: int) -> None:
    """In float32 the cosine of a large angle would be noise."""
    ticks = np.array([1, 7, 1_000_003, 2**30 + 5])
    right = np.cos(np.linspace(-np.pi, np.pi, waves)[None] * ticks[:, None])
    np.testing.assert_allclose(cosines(jnp.asarray(ticks, jnp.int32), waves), right, atol=1e-5)  # float64 of 1e9


def test_no_waves_are_told() -> None:
    index = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(UsageError, match="num_waves=0 must be at least 1"):
        MIXERS["agalite"](embed_dim=4, num_waves=0).init(
            jax.random.key(0), jnp.zeros((1, 1, 4)), Tokens(index, index[..., None], 1)
        )
