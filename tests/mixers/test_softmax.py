"""Softmax attention: which parts of a head turn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers.protocol import Tokens
from ar_jax.mixers.softmax import Softmax


def test_channels_and_heads_that_do_not_turn_do_not_move_with_the_position() -> None:
    mixer = Softmax(embed_dim=16, num_heads=2, rope_channels=4, rope_heads=1)
    x, step = jax.random.normal(jax.random.key(0), (1, 1, 16)), jnp.zeros((1, 1), jnp.int32)

    def query(position: int) -> Any:
        tokens = Tokens(step, jnp.full((1, 1, 1), position), 1)
        return mixer.apply(params, x, tokens, method="queries")

    params = mixer.init(jax.random.key(1), x, Tokens(step, step[..., None], 1))
    moved = np.asarray(jnp.abs(query(0) - query(3)))[0, 0] > 1e-6
    expected = np.zeros((2, 8), bool)
    expected[0, :4] = True
    np.testing.assert_array_equal(moved, expected)


def test_a_compiled_step_turns_some_channels_as_an_eager_one_does() -> None:
    """XLA on CPUs wrote the turned channels over those that it had still to read, for a single token of one example."""
    mixer = Softmax(embed_dim=16, num_heads=2, rope_channels=4)
    x, empty = jax.random.normal(jax.random.key(0), (1, 1, 16)), mixer.init_state(1, 8, 1)

    def step(params: Any, x: Any, place: Any, state: Any) -> Any:
        tokens = Tokens(place[None, None], place[None, None, None], 1)
        return mixer.apply(params, x, tokens, state)

    place = jnp.int32(7)
    params = mixer.init(jax.random.key(1), x, Tokens(place[None, None], place[None, None, None], 1))
    compiled, eager = (run(params, x, place, empty) for run in (jax.jit(step), step))
    np.testing.assert_allclose(compiled[0], eager[0], atol=1e-5)
    np.testing.assert_allclose(compiled[1].k, eager[1].k, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rope_channels=3), "rope_channels=3 must be even"),
        (dict(rope_channels=10), "at most head_dim=8"),
        (dict(num_kv_heads=1, rope_heads=1), "each with keys of its own"),
    ],
)
def test_what_cannot_turn_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Softmax(embed_dim=16, num_heads=2, **options).dims  # noqa: B018  (the property checks)
