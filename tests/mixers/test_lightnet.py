"""LightNet: the additive recurrence by its equation, in both directions, and its rotation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.kernels.softmax_memory import softmax_mean, softmax_memory
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

LENGTH = 21  # more than a chunk, and no multiple of it


def arrays(seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, ...]:
    """q, log k [1, T, 2, 3], v [1, T, 2, 4]."""
    rng = np.random.default_rng(seed)
    q, log_k = rng.normal(size=(2, 1, LENGTH, 2, 3))
    return tuple(np.float32(a) for a in (q, spread * log_k, rng.normal(size=(1, LENGTH, 2, 4))))


def by_the_equation(q: np.ndarray, log_k: np.ndarray, v: np.ndarray, last: int | None = None) -> np.ndarray:
    """A softmax over the tokens up to each, or up to the last, in float64."""
    out = np.zeros(v.shape)
    for t in range(q.shape[1]):
        seen = slice(0, (t if last is None else last) + 1)
        weights = np.exp(log_k[:, seen] - log_k[:, seen].max(axis=1, keepdims=True), dtype=np.float64)
        weights /= weights.sum(axis=1, keepdims=True)
        out[:, t] = np.einsum("bnh,bsnh,bsne->bne", q[:, t], weights, v[:, seen])
    return out


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_the_recurrence_is_a_running_softmax_even_of_keys_far_apart(spread: float) -> None:
    q, log_k, v = arrays(spread=spread)
    found, _ = jax.jit(softmax_memory)(q, log_k, v)
    np.testing.assert_allclose(found, by_the_equation(q, log_k, v), atol=1e-5)  # float32, sums of 21 terms


def test_with_all_written_before_the_first_asks_it_is_one_softmax() -> None:
    q, log_k, v = arrays(1)
    found = softmax_mean(q, log_k, v)
    np.testing.assert_allclose(found, by_the_equation(q, log_k, v, LENGTH - 1), atol=1e-5)  # float32


def test_what_starts_anew_has_forgotten_all() -> None:
    q, log_k, v = arrays(2)
    cut = 6
    starts = jnp.zeros((1, LENGTH), bool).at[0, cut].set(True)
    found, _ = softmax_memory(q, log_k, v, starts=starts)
    alone, _ = softmax_memory(q[:, cut:], log_k[:, cut:], v[:, cut:])
    np.testing.assert_allclose(found[:, cut:], alone, atol=1e-6)


def test_rotated_keys_depend_on_the_distance_on_each_axis_alone() -> None:
    """MD-LRPE: moving all tokens by the same step on the grid changes nothing, moving some of them does."""
    mixer = MIXERS["lightnet"](embed_dim=8, num_heads=2, expand_ratio=4, rotation="cosine", position_axes=2)
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    index = jnp.arange(6, dtype=jnp.int32)[None]
    tokens = Tokens(index, jnp.stack([index // 3, index % 3], axis=-1), 6)
    params = mixer.init(jax.random.key(1), x, tokens)

    def moved(by: jax.Array) -> jax.Array:
        return mixer.apply(params, x, tokens.replace(position=tokens.position + by))[0]

    here = moved(jnp.zeros((1, 1, 2), jnp.int32))
    np.testing.assert_allclose(moved(jnp.asarray([[[5, 2]]])), here, atol=1e-5)  # cosines of larger angles
    assert np.abs(moved(tokens.position) - here).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(num_heads=3), "does not divide embed_dim=8"), (dict(rotation="sine"), "rotation='sine' is unknown.*cosine")],
)
def test_wrong_options_are_told(fields: dict[str, object], message: str) -> None:
    mixer = MIXERS["lightnet"](embed_dim=8, **fields)
    index = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(UsageError, match=message):
        mixer.init(jax.random.key(0), jnp.zeros((1, 2, 8)), Tokens(index, index[..., None], 2))
