"""Long convolutions, moving averages and state spaces: transforms, recurrences and definitions give the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.mixers import MIXERS
from ar_jax.mixers.common.long_convolution import STEPWISE, long_convolution
from ar_jax.mixers.common.moving_average import MovingAverage
from ar_jax.mixers.protocol import Tokens

BATCH, LENGTH, CHANNELS, SIZE = 2, 11, 3, 4


def tokens_of(length: int, remembered: int | None = None, step: Any = None) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None] if step is None else jnp.asarray(step, jnp.int32)[None]
    return Tokens(index, index[..., None], length if remembered is None else remembered)


def case(shared: bool) -> tuple[Any, Any, Any]:
    """Values [B, T, C], and complex powers that all channels share, or real ones of each channel."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(BATCH, LENGTH, CHANNELS)).astype(np.float32)
    rows = 1 if shared else CHANNELS
    decay, weight = -draw.uniform(0.05, 1, (rows, SIZE)), draw.normal(size=(CHANNELS, SIZE))
    if shared:
        decay, weight = decay + 1j * draw.normal(size=decay.shape), weight + 1j * draw.normal(size=weight.shape)
    dtype = jnp.complex64 if shared else jnp.float32
    return jnp.asarray(x), jnp.asarray(decay, dtype), jnp.asarray(weight, dtype)


def by_definition(x: Any, decay: Any, weight: Any) -> np.ndarray:
    """The recurrence in float64."""
    a, w = np.exp(np.asarray(decay, np.complex128))[None], np.asarray(weight, np.complex128)[None]
    h, out = np.zeros((BATCH, CHANNELS, SIZE), np.complex128), []
    for t in range(x.shape[1]):
        h = a * h + np.asarray(x)[:, t, :, None]
        out.append((w * h).sum(axis=-1).real)
    return np.stack(out, axis=1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cuts", [[11], [6, 5], [1, 2, 8], [STEPWISE + 1, 1, 1, 4]], ids=str)
def test_pieces_of_any_length_give_the_recurrence(cuts: list[int], shared: bool) -> None:
    x, decay, weight = case(shared)
    state, pieces = jnp.zeros((BATCH, CHANNELS, SIZE), weight.dtype), []
    for start, size in zip(np.cumsum([0, *cuts[:-1]]), cuts, strict=True):
        out, state = jax.jit(long_convolution)(x[:, start : start + size], decay, weight, tokens_of(size), state)
        pieces.append(out)
    found = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(found, by_definition(x, decay, weight), atol=2e-5)  # float32, sums of 44 terms


@pytest.mark.parametrize("remembered", [3, 8])
def test_a_query_reads_as_the_next_token_would(remembered: int) -> None:
    x, decay, weight = case(True)
    behind = [min(i, remembered - 1) for i in range(LENGTH - remembered)]  # each query's step
    tokens = tokens_of(LENGTH, remembered, [*range(remembered), *behind])
    out = long_convolution(x, decay, weight, tokens, None)[0]
    for i, last in enumerate(behind):
        line = jnp.concatenate([x[:, : last + 1], x[:, remembered + i : remembered + i + 1]], axis=1)
        np.testing.assert_allclose(out[:, remembered + i], by_definition(line, decay, weight)[:, -1], atol=2e-5)


@pytest.mark.parametrize("truncation", [0, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_the_moving_average_damps_what_it_forgets(causal: bool, truncation: int) -> None:
    x = case(False)[0]
    average = MovingAverage(CHANNELS, SIZE, causal, truncation)
    (out, _), variables = jax.jit(lambda x: average.init_with_output(jax.random.key(0), x, tokens_of(LENGTH)))(x)
    p = {name: np.asarray(value, np.float64) for name, value in variables["params"].items()}
    share, damping = (1 / (1 + np.exp(-p[name])) for name in ("alpha", "delta"))
    expected = p["omega"] * np.asarray(x, np.float64)
    for direction in range(1 if causal else 2):
        weight = share[direction] * p["beta"][direction] * p["gamma"][direction] * SIZE**-0.5
        for lag in range(truncation or LENGTH):
            kernel = (weight * (1 - share[direction] * damping[direction]) ** lag).sum(axis=-1)
            if direction == 0:
                expected[:, lag:] += kernel * np.asarray(x)[:, : LENGTH - lag]
            else:
                expected[:, : LENGTH - lag] += kernel * np.asarray(x)[:, lag:]
    np.testing.assert_allclose(out, expected, atol=2e-5)  # float32, sums of 88 terms


def test_a_state_space_is_the_same_whatever_the_length_and_its_state_does_not_grow() -> None:
    mixer = MIXERS["gss"](embed_dim=8, state_dim=4)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 40, 8)), jnp.float32)
    variables = mixer.init(jax.random.key(0), x[:, :5], tokens_of(5))
    long, short = (mixer.apply(variables, x[:, :n], tokens_of(n))[0] for n in (40, 10))
    np.testing.assert_allclose(long[:, :10], short, atol=2e-5)  # float32 transforms of other lengths
    assert mixer.init_state(1, 10, 1).shape == mixer.init_state(1, 10_000, 1).shape == (1, 2, 4)
