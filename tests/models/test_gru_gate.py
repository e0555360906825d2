"""Gates in place of residual sums: nearly shut at first, and wrong combinations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.gru_gate import GRUGate


def test_what_is_new_comes_in_as_the_gate_opens() -> None:
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 4, 6))
    params = jax.jit(GRUGate().init)(jax.random.key(1), x, y)["params"]
    w = {name: np.asarray(p["kernel"]) for name, p in params.items() if name != "offset"}
    a, b = np.asarray(x), np.asarray(y)

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    shares = {}
    for offset in (2.0, -50.0):
        out = jax.jit(GRUGate().apply)({"params": params | {"offset": jnp.full(6, offset)}}, x, y)
        reset = sigmoid(b @ w["reset_new"] + a @ w["reset_old"])
        share = sigmoid(b @ w["update_new"] + a @ w["update_old"] - offset)
        new = np.tanh(b @ w["new"] + (reset * a) @ w["old"])
        np.testing.assert_allclose(out, (1 - share) * a + share * new, atol=1e-5)  # float32, sums of six terms
        shares[offset] = share.mean()
    assert (np.asarray(params["offset"]) == 2).all() and shares[2.0] < 0.4 and shares[-50.0] == pytest.approx(1)


@pytest.mark.parametrize("wrong", [dict(norm_first=False), dict(adaln="block"), dict(side_by_side=True)])
def test_gates_are_for_plain_pre_norm_blocks(wrong: dict) -> None:
    with pytest.raises(UsageError, match="residual='gru' needs norm_first=True"):
        BlockOptions(residual="gru", **wrong)


def test_another_residual_is_told() -> None:
    with pytest.raises(UsageError, match="model.residual='gruu' is unknown. Did you mean 'gru'"):
        BlockOptions(residual="gruu")
