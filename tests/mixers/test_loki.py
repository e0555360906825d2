"""Loki: all keys are softmax attention, components measured on keys, and what decoding reads."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.key_components import calibrated
from ar_jax.config import UsageError
from ar_jax.kernels.ranked_attention import ranked_attention
from ar_jax.kernels.step_attention import visibility
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.from_softmax import from_softmax
from ar_jax.training.paths import named_leaves

LENGTH = 12

tiny = cases.tiny.__wrapped__  # what is not hashable cannot be kept


def arrays(rank: int) -> tuple[Any, ...]:
    """Queries, keys and values; keys vary in `rank` channels alone."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, LENGTH, 2, 4)) for i in range(3))
    return q, k * (jnp.arange(4) < rank)[None, None, None], v


def test_each_query_reads_the_visible_keys_of_the_largest_scores_with_exact_logits() -> None:
    q, k, v = arrays(4)
    step = jnp.arange(LENGTH)[None]
    out = jax.jit(functools.partial(ranked_attention, rank=2, num_keys=3))(q, k, v, visibility(step, step))
    for t in range(LENGTH):
        scores = np.asarray(k)[0, : t + 1, 0, :2] @ np.asarray(q)[0, t, 0, :2]
        best = np.argsort(-scores)[:3]
        weight = np.exp(np.asarray(k)[0, best, 0] @ np.asarray(q)[0, t, 0] / 2)
        np.testing.assert_allclose(
            out[0, t, 0], weight / weight.sum() @ np.asarray(v)[0, best, 0], atol=1e-5
        )  # float32


def test_a_softmax_model_becomes_a_loki_model_and_with_all_keys_stays_the_same() -> None:
    plain, loki = cases.tiny("softmax"), tiny("softmax", model__mixer=dict(kind="loki", num_heads=2, num_keys=99))
    trained, values = cases.tiny_params(plain), cases.tokens(plain, 3)
    context = plain.model.context(jax.random.key(0), 3, jnp.zeros(3, jnp.int32))
    params = from_softmax(trained, jax.jit(loki.init)(jax.random.key(1)))
    params, shares = calibrated(loki.model, params, [(values, context)] * 2)
    components = [leaf for name, leaf in named_leaves(params).items() if name.endswith("components")]
    for leaf in components:
        product = np.einsum("...rh,...sh->...rs", leaf, leaf)
        np.testing.assert_allclose(
            product, np.broadcast_to(np.eye(leaf.shape[-1]), product.shape), atol=1e-5
        )  # float32
        assert np.abs(leaf - np.eye(leaf.shape[-1])).max() > 0.1
    assert components and all((np.diff(share, axis=-1) <= 1e-9).all() for share in shares.values())
    chunk = plain.model.feed.parallel()
    read = [
        jax.jit(lambda p, s=s: s.model.read(p, values, context, chunk)[0])(p)
        for s, p in ((plain, trained), (loki, params))
    ]
    np.testing.assert_allclose(read[1], read[0], atol=1e-4)  # float32, two layers, keys and queries turned
    with pytest.raises(UsageError, match="no place for"):
        from_softmax(cases.tiny_params(tiny("softmax", model__mixer=dict(kind="softmax", bias_distance=2))), params)


def test_components_bring_the_variance_of_the_keys_to_the_front() -> None:
    """Keys that lie in two dimensions are ranked exactly by two components, and not by two channels."""
    q, flat, v = arrays(2)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype(np.float32)
    k, step = flat @ turn, jnp.arange(LENGTH)[None]
    _, vectors = np.linalg.eigh(np.cov(np.asarray(k).reshape(-1, 4).T))
    components = jnp.asarray(vectors[:, ::-1].T)
    seen = visibility(step, step)
    exact = ranked_attention(q, k, v, seen, rank=4, num_keys=3)
    turned = ranked_attention(q @ components.T, k @ components.T, v, seen, rank=2, num_keys=3)
    np.testing.assert_allclose(turned, exact, atol=1e-4)  # float32; scores differ by their mean's part alone
    assert np.abs(ranked_attention(q, k, v, seen, rank=2, num_keys=3) - exact).max() > 0.05


def test_what_does_not_fit_is_told() -> None:
    index = jnp.arange(3)[None]
    for fields in (dict(num_keys=0), dict(rank=9)):
        with pytest.raises(UsageError, match="in 1 ... 4"):
            MIXERS["loki"](embed_dim=8, num_heads=2, **fields).init(
                jax.random.key(0), jnp.zeros((1, 3, 8)), Tokens(index, index[..., None], 3)
            )
