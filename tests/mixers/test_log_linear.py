"""Log-linear Mamba-2: its state has a level more for each doubling of the context, and levels that do not suffice are told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens


def tokens_of(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def test_the_state_has_a_level_more_for_each_doubling() -> None:
    mixer = MIXERS["mamba2"](embed_dim=8, state_dim=3, head_dim=4, num_levels=12)
    levels = [
        jax.eval_shape(lambda n=n: mixer.init_state(1, n, 1)).memory.memory.shape[2] for n in (64, 128, 129, 2048)
    ]
    assert levels == [6, 7, 8, 11]


def test_equal_scales_of_all_levels_are_one_memory() -> None:
    """Where no level weighs more than another, it is Mamba-2, times softplus(0)."""
    x = np.random.default_rng(0).normal(size=(1, 7, 8)).astype(np.float32)
    plain, tree = (MIXERS["mamba2"](embed_dim=8, state_dim=3, head_dim=4, norm=False, num_levels=n) for n in (None, 4))
    variables = jax.jit(lambda: tree.init(jax.random.key(0), x, tokens_of(7)))()
    params = variables["params"] | {"skip": jnp.zeros(4), "level_weight": jnp.zeros((4, 4))}
    alone = {name: p for name, p in params.items() if name not in ("levels", "level_weight")}
    right = jax.jit(lambda params: plain.apply({"params": params}, x, tokens_of(7))[0])(alone)
    found = jax.jit(lambda params: tree.apply({"params": params}, x, tokens_of(7))[0])(params)
    np.testing.assert_allclose(found, np.log(2) * right, atol=1e-5)  # float32, sums of 7 terms


def test_too_few_levels_are_told() -> None:
    mixer = MIXERS["mamba2"](embed_dim=8, state_dim=3, head_dim=4, num_levels=3)
    with pytest.raises(UsageError, match="num_levels=3 serve 4 tokens; for 9 set it to 5"):
        jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.zeros((1, 9, 8)), tokens_of(9)))
