"""Stochastically subsampled attention: what it reads, what it costs, and the mean of its sub-models."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.evaluation.ensemble import ensemble_log_prob
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.mixers.subsampled import attend_in_blocks
from ar_jax.sampling.likelihood import log_prob

LENGTH, WINDOW = 11, 4


def tokens(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def test_a_query_reads_the_visible_keys_of_its_shuffled_block_and_itself() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, LENGTH, 1, 3)) for i in range(3))
    order = np.random.default_rng(0).permutation(LENGTH)
    step = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    labels = {"step": step, "segment": jnp.zeros_like(step), "there": jnp.ones_like(step, bool)}
    out = attend_in_blocks(q, k, v, labels, jnp.asarray(order), WINDOW)
    for t in range(LENGTH):
        block = order[t // WINDOW * WINDOW : (t // WINDOW + 1) * WINDOW]
        read = sorted({t, *(int(j) for j in block if j <= t)})
        weight = np.exp(np.asarray(k)[0, read, 0] @ np.asarray(q)[0, t, 0] / np.sqrt(3))
        np.testing.assert_allclose(
            out[0, t, 0], weight / weight.sum() @ np.asarray(v)[0, read, 0], atol=1e-6
        )  # float32


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_without_a_key_it_is_softmax_attention_and_with_one_it_is_random(spread: float) -> None:
    mixer = MIXERS["subsampled"](embed_dim=8, num_heads=2, window=WINDOW, spread=spread)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, 8))
    variables = mixer.init(jax.random.key(1), x, tokens(LENGTH))
    plain = MIXERS["softmax"](embed_dim=8, num_heads=2)
    expected = plain.apply({"params": variables["params"]["softmax"]}, x, tokens(LENGTH))[0]
    np.testing.assert_array_equal(mixer.apply(variables, x, tokens(LENGTH))[0], expected)
    drawn = [mixer.apply(variables, x, tokens(LENGTH), rngs={"dropout": jax.random.key(i)})[0] for i in range(2)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def test_training_costs_flops_in_proportion_to_the_length() -> None:
    mixer = MIXERS["subsampled"](embed_dim=8, num_heads=2, window=16)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return mixer.apply(params, x, tokens(x.shape[1]), rngs={"dropout": jax.random.key(0)})[0].sum()

    @functools.cache
    def count(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        params = jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, tokens(length)), x)
        return flops(jax.grad(loss), params, x)

    assert count(2048) < 2.02 * count(1024)


def test_the_mean_of_sub_models_is_a_likelihood_of_its_own() -> None:
    system = cases.tiny("subsampled")
    params, values = cases.tiny_params(system), cases.tokens(system, 2)
    context = system.model.context(jax.random.key(2), 2, jnp.zeros(2, jnp.int32))
    run = jax.jit(functools.partial(ensemble_log_prob, system.model))
    keys = jax.random.split(jax.random.key(0), 3)
    one = [run(params, values, context, keys[i : i + 1]) for i in range(3)]
    together = run(params, values, context, keys)
    assert np.abs(one[0] - one[1]).max() > 1e-4
    assert (together > np.min(one, axis=0) - 1e-4).all()  # a mean of probabilities is not below the least of them
    whole = log_prob(system.model, params, values, context)
    assert np.isfinite(whole).all() and np.abs(whole - together).max() > 1e-4
