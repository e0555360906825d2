"""HGRN's recurrence, its gradient, and its floor."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.hgrn import gated_sum
from ar_jax.mixers.protocol import Tokens


def test_the_recurrence_and_its_gradient_are_those_of_the_equation_where_nothing_is_forgotten_too() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    values, cotangent = (jax.random.normal(key, (2, 20, 3)) for key in keys[:2])
    log_decay = jnp.where(jax.random.bernoulli(keys[2], 0.7, (2, 20, 3)), -jax.random.uniform(keys[2], (2, 20, 3)), 0)
    values = jnp.where(log_decay < 0, values, 0)  # what is not remembered: a query, or padding
    before = jax.random.normal(keys[3], (2, 3))

    def plain(values: Any, log_decay: Any, before: Any) -> Any:
        def step(h: Any, now: Any) -> Any:
            h = jnp.exp(now[1]) * h + now[0]
            return h, h

        last, out = jax.lax.scan(step, before, (jnp.swapaxes(values, 0, 1), jnp.swapaxes(log_decay, 0, 1)))
        return jnp.swapaxes(out, 0, 1), last

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(function: Any) -> Any:
        out, pull = jax.vjp(lambda v, d, b: function(v, jnp.minimum(d, 0), b), values, log_decay, before)
        gradient = pull((cotangent, jnp.ones_like(before)))
        return out, gradient[0], jnp.where(log_decay < 0, gradient[1], 0), gradient[2]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), pulled(gated_sum), pulled(plain))  # float32


def test_a_floor_keeps_its_share_of_the_past() -> None:
    mixer = MIXERS["hgrn"](embed_dim=4, decay_floor=0.99)
    index = jnp.arange(5, dtype=jnp.int32)[None]
    x, tokens = jax.random.normal(jax.random.key(0), (1, 5, 4)), Tokens(index, index[..., None], 5)
    variables = jax.jit(lambda: mixer.init(jax.random.key(1), x, tokens))()
    state = mixer.init_state(1, 5, 1)
    remember = jax.jit(lambda state: mixer.apply(variables, x, tokens, state)[1].memory)
    after = [remember(state.replace(memory=jnp.full((1, 4), start))) for start in (0.0, 1.0)]
    kept = np.asarray(after[1] - after[0])
    assert (kept >= 0.99**5 - 1e-6).all() and (kept < 1).all()


def test_a_floor_of_one_is_told() -> None:
    index = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(UsageError, match="decay_floor=1.0 must lie in"):
        MIXERS["hgrn"](embed_dim=4, decay_floor=1.0).init(
            jax.random.key(0), jnp.zeros((1, 1, 4)), Tokens(index, index[..., None], 1)
        )
