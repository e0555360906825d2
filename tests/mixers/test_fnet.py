"""Fourier mixing: whole sequences against numpy's transform, and the causal samples against their sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.fnet import transform_of_length
from ar_jax.mixers.protocol import NEVER, Tokens

LENGTH, DIM = 11, 6


def mixed(x: np.ndarray, step: np.ndarray | None = None, row: np.ndarray | None = None, **fields: Any) -> np.ndarray:
    index = jnp.arange(len(x), dtype=jnp.int32)[None]
    step = index if step is None else jnp.asarray(step)[None]
    tokens = Tokens(step, index[..., None], len(x), padded=bool((step == NEVER).any()), row=row)
    mixer = MIXERS["fnet"](embed_dim=DIM, **fields)
    return np.asarray(jax.jit(lambda x: mixer.apply({}, x, tokens)[0][0])(jnp.asarray(x)[None]))


def sequence() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)


@pytest.mark.parametrize("kept", [1, 5, 8, 11])
def test_the_transform_is_that_of_what_is_not_padding(kept: int) -> None:
    x = sequence()
    step = np.where(np.arange(LENGTH) < kept, 0, NEVER).astype(np.int32)
    expected = np.fft.fft2(x[:kept]).real
    np.testing.assert_allclose(mixed(x, step, causal=False)[:kept], expected, atol=2e-5)  # float32, sums of 66 terms
    np.testing.assert_allclose(mixed(x[:kept], causal=False, unitary=True), expected / (kept * DIM) ** 0.5, atol=1e-5)


def test_a_transform_keeps_its_precision_over_a_long_sequence() -> None:
    x = np.random.default_rng(1).normal(size=(70_000, 1)).astype(np.complex64)
    found = transform_of_length(jnp.asarray(x)[None], jnp.full((1, 1), 70_000))[0]
    assert np.abs(found - np.fft.fft(x, axis=0)).max() < 3e-3  # of values up to 1000: float32


def test_a_transform_of_a_whole_sequence_stands_on_places_not_on_the_order_fed() -> None:
    x, row = sequence(), np.random.default_rng(2).permutation(LENGTH)
    np.testing.assert_allclose(
        mixed(x[row], row=jnp.asarray(row)[None], causal=False), np.fft.fft2(x).real[row], atol=2e-5
    )


def test_the_causal_form_keeps_the_own_frequency_of_samples_of_the_past() -> None:
    x, samples, stride = sequence(), 3, 2
    out, channels = mixed(x, num_samples=samples, stride=stride), np.fft.fft(x, axis=-1)
    for t in range(LENGTH):
        taps = [(j, t - j * stride) for j in range(samples) if t >= j * stride]
        expected = sum(np.exp(-2j * np.pi * t * j / samples) * channels[s] for j, s in taps).real
        np.testing.assert_allclose(out[t], expected, atol=2e-5)  # float32, sums of 18 terms


def test_the_whole_transform_costs_n_log_n() -> None:
    mixer = MIXERS["fnet"](embed_dim=DIM, causal=False)

    def cost(length: int) -> int:
        index = jnp.arange(length, dtype=jnp.int32)[None]
        tokens = Tokens(index, index[..., None], length)
        return flops(lambda x: mixer.apply({}, x, tokens)[0], jax.ShapeDtypeStruct((1, length, DIM), jnp.float32))

    assert cost(2048) < 2.25 * cost(1024)  # 2 * 11 / 10


def test_too_few_samples_are_told() -> None:
    with pytest.raises(UsageError, match="num_samples=1 must be at least 2"):
        mixed(sequence(), num_samples=1)
