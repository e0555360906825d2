"""Filters against a plain reading of their definitions, one vocabulary at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ar_jax.heads.filters import draw, filtered
from ar_jax.heads.noise import Drawn
from ar_jax.heads.protocol import Sampling

filter_jit = jax.jit(filtered)


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def plain(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p and min-p; tokens as likely as the last one kept are kept too."""
    weight = np.exp((logits - logits.max()) / temperature)
    weight[weight < np.sort(weight)[::-1][min(top_k, len(weight)) - 1]] = 0
    total, kept = 0.0, []
    for token in np.argsort(-weight, kind="stable"):
        if total < top_p * weight.sum() or not kept:
            kept.append(token)
        assume(abs(total - top_p * weight.sum()) > 1e-4)  # float32 sums cannot settle such a draw
        total += weight[token]
    weight[weight < weight[kept[-1]]] = 0
    assume((np.abs(weight - min_p * weight.max()) > 1e-5).all() or min_p in (0, 1))
    weight[weight < min_p * weight.max()] = 0
    return normalised(weight)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-3, 3), min_size=7, max_size=7),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.13, 0.47, 0.77, 0.999]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_filters_keep_what_their_definitions_keep(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Whole numbers as logits, so that ties abound."""
    row = np.asarray(logits, np.float32)
    chosen = Sampling(*(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p)))
    expected = plain(row.astype(np.float64), temperature, top_k, top_p, min_p)
    found = np.asarray(jax.nn.softmax(filter_jit(row, chosen)))
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 softmax of 7 terms


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1, 2]),  # both likeliest: a tie
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({"top_p": 0.0}, [1, 2]),  # the likeliest always stays
        ({"top_p": 0.8}, [1, 2]),
        ({"top_p": 0.88}, [0, 1, 2]),  # 0.87 are before it: the token that crosses the threshold stays
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.26}, [1, 2]),
        ({"min_p": 0.24}, [0, 1, 2]),
        ({"min_p": 1.0}, [1, 2]),
        ({"min_p": 0.0}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.85, "min_p": 0.3}, [1, 2]),
        ({"temperature": 2.0, "min_p": 0.26}, [0, 1, 2]),  # the temperature comes first: 0.25 becomes 0.5
    ],
    ids=str,
)
def test_filters_on_four_tokens(setting: dict[str, Any], kept: list[int]) -> None:
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.4, 0.02]]))
    np.testing.assert_array_equal(np.flatnonzero(filtered(logits, Sampling(**setting))[0] > -np.inf), kept)


def test_all_tokens_stay_where_rounding_keeps_their_sum_below_top_p() -> None:
    """No threshold was enough then, and the lowest one was no number, which dropped every token."""
    logits = 2 * jax.random.normal(jax.random.key(0), (200, 30))
    kept = filtered(logits, Sampling(top_k=5, top_p=1.0)) > -jnp.inf
    np.testing.assert_array_equal(kept.sum(axis=-1), 5)


def test_a_lone_token_keeps_all_probability_and_removed_ones_are_never_drawn() -> None:
    logits = jnp.asarray([-jnp.inf, -jnp.inf, 3.0, -jnp.inf])
    for setting in ({}, {"top_k": 3}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 3, "top_p": 0.5, "min_p": 0.5}):
        np.testing.assert_array_equal(jax.nn.softmax(filtered(logits, Sampling(**setting))), [0, 0, 1, 0])
    tokens = draw(Drawn(jax.random.key(0)), jnp.tile(jnp.asarray([[0.0, 1.0, 2.0, 3.0]]), (500, 1)), Sampling(top_k=2))
    assert set(np.asarray(tokens).tolist()) == {2, 3}


def test_temperature_zero_takes_the_likeliest_whatever_the_key() -> None:
    logits = jax.random.normal(jax.random.key(0), (50, 9))
    for seed in range(3):
        tokens = draw(Drawn(jax.random.key(seed)), logits, Sampling(temperature=0.0, top_k=5))
        np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
    assert tokens.dtype == jnp.int32


def test_draws_follow_the_filtered_probabilities() -> None:
    logits = jnp.asarray([0.0, 1.0, 2.0, -1.0])
    setting = Sampling(temperature=0.8, top_k=3)
    many = jax.jit(functools.partial(draw, settings=setting))(
        Drawn(jax.random.key(0)), jnp.tile(logits[None], (20000, 1))
    )
    expected = normalised(np.exp(np.asarray([0.0, 1.0, 2.0, -np.inf]) / 0.8))
    found = np.bincount(many, minlength=4) / len(many)
    np.testing.assert_allclose(found, expected, atol=0.015)  # four deviations of a share in 20000 draws
