"""Mega: its attention's weights, chunks that bound what is read, and what a config may not ask for."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.common.single_head import Head, attend
from ar_jax.mixers.norms import make_norm
from ar_jax.mixers.protocol import Tokens

LENGTH, WIDTH, CHUNK = 7, 3, 3
DRAW = np.random.default_rng(0)
Q, K, V = (DRAW.normal(size=(1, LENGTH, WIDTH)).astype(np.float32) for _ in range(3))


def tokens_of(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def weigh(attention: str, logits: np.ndarray, scale: float) -> np.ndarray:
    """Of the products q . k that a query sees, which are told their biases: 0.1 (distance)."""
    products, bias = logits
    if attention == "softmax":
        weights = np.exp(products * scale + bias)
        return weights / weights.sum()
    x = products / len(products) + bias
    if attention == "relu2":
        return np.maximum(x, 0) ** 2
    return np.asarray([0.5 * (1 + math.erf((v - 0.707107) / (0.282095 * math.sqrt(2)))) for v in x])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk_size", [0, CHUNK])
@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
def test_a_query_weighs_the_keys_of_its_chunk(attention: str, chunk_size: int, causal: bool) -> None:
    head = Head(attention, chunk_size, causal, lambda distance: 0.1 * distance.astype(jnp.float32))
    out = jax.jit(lambda q, k, v: attend(head, q, k, v, tokens_of(LENGTH), None)[0])(Q, K, V)
    for t in range(LENGTH):
        first = t // chunk_size * chunk_size if chunk_size else 0
        last = t + 1 if causal else min(first + chunk_size, LENGTH) if chunk_size else LENGTH
        seen = np.arange(first, last)
        weights = weigh(attention, np.stack([K[0, seen] @ Q[0, t], 0.1 * (t - seen)]), WIDTH**-0.5)
        np.testing.assert_allclose(out[0, t], weights @ V[0, seen], atol=1e-5)  # float32, sums of 7 terms


def test_the_rotary_bias_is_the_product_of_two_turned_vectors() -> None:
    mixer = MIXERS["mega"](embed_dim=2, z_dim=4, bias="rotary", ema_dim=1)
    variables = mixer.init(jax.random.key(0), jnp.zeros((1, 2, 2)), tokens_of(2))
    a, b = 50 * np.asarray(variables["params"]["turned"])
    variables["params"]["turned"] = jnp.stack([a, b])
    distance = jnp.arange(-3, 4)
    found = mixer.apply(variables, distance, method="_bias")

    def turned(vector: np.ndarray, place: int) -> np.ndarray:
        angle = place * 10000.0 ** (-np.arange(2) / 2)
        first, second = vector[:2], vector[2:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    expected = [turned(a, 5 + d) @ turned(b, 5) for d in np.asarray(distance)]
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32, sums of 4 terms of order one


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(attention="softmx"), "Did you mean 'softmax'"),
        (dict(bias="rotery"), "Did you mean 'rotary'"),
        (dict(chunk_size=1), "chunk_size=1 must be 0, or at least 2"),
        (dict(truncation=-2), "truncation=-2 must be 0, or at least 2"),
        (dict(bias="rotary", z_dim=3), "z_dim=3 is odd"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MIXERS["mega"](embed_dim=4, **fields).init(jax.random.key(0), jnp.zeros((1, 2, 4)), tokens_of(2))


def test_a_batch_norm_uses_measured_moments_and_training_moves_them_towards_the_batchs() -> None:
    norm, x = MIXERS["mega"](4, norm="batch").norm, 3 + 2 * jax.random.normal(jax.random.key(0), (8, 50, 4))
    module = make_norm(norm, 1e-5, jnp.float32, jnp.float32)()
    params = module.init(jax.random.key(1), x)
    moments = jnp.asarray([[1.0] * 4, [4.0] * 4])
    params["params"]["statistics"]["moments"] = moments
    np.testing.assert_allclose(module.apply(params, x), (x - 1) / 2, atol=1e-4)
    change = jax.grad(lambda params: module.apply(params, x).sum())(params)["params"]["statistics"]["moments"]
    seen = jnp.stack([x.mean(axis=(0, 1)), x.var(axis=(0, 1))])
    np.testing.assert_allclose(change, 0.1 * (seen - moments), atol=1e-4)
