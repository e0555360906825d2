"""Step attention: every implementation against the definition, in value and gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ar_jax.kernels.step_attention import IMPLEMENTATIONS, step_attention

NEVER = np.iinfo(np.int32).max
# float32: sums of 9 terms of order one. bfloat16 keeps 8 bits: logits, weights and results each round by up to 1/256.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2}

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def definition(q: Any, k: Any, v: Any, query_step: Any, key_step: Any, window: int | None, bias: Any) -> jax.Array:
    """The docstring's equation in float32, with repeated key heads and a softmax over what is visible alone."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[3] ** -0.5 + bias
    visible = key_step[:, None, :] <= query_step[:, :, None]
    if window is not None:
        visible &= query_step[:, :, None] - key_step[:, None, :] < window
    weights = jnp.where(visible[:, None], jnp.exp(jnp.where(visible[:, None], logits, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total > 0, total, 1.0), v)


def inputs(shape: tuple[int, int, int, int, int, int], seed: int, shared: bool) -> tuple[Any, ...]:
    """q, k, v, query and key steps, bias; `shared` gives the steps a batch of one. Some keys are never read."""
    batch, time, keys, heads, shared_heads, dim = shape
    r = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(r.normal(size=(batch, n, h, dim)), jnp.float32)
        for n, h in ((time, heads), (keys, shared_heads), (keys, shared_heads))
    )
    rows = 1 if shared else batch
    query_step = jnp.asarray(r.integers(0, 5, (rows, time)), jnp.int32)
    key_step = np.where(r.random((rows, keys)) < 0.1, NEVER, r.integers(0, 5, (rows, keys)))
    bias = jnp.asarray(r.normal(size=(rows, heads, time, keys)), jnp.float32)
    return q, k, v, query_step, jnp.asarray(key_step, jnp.int32), bias


def value_and_gradients(attend: Any, *arrays: Any) -> tuple[jax.Array, Any]:
    """The output, and the gradients of a sum of its elements with uneven weights by q, k, v and the bias."""

    def loss(q: Any, k: Any, v: Any, bias: Any) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, bias)
        return (out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
    return out, gradients


@every_implementation
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking compiles for minutes
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.sampled_from([(4, 1), (4, 2), (3, 3)])),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 1000),
)
def test_it_is_its_definition_in_value_and_gradient(
    implementation: str, sizes: Any, window: int | None, shared: bool, dtype: str, seed: int
) -> None:
    batch, time, keys, (heads, shared_heads) = sizes
    q, k, v, query_step, key_step, bias = inputs((batch, time, keys, heads, shared_heads, 4), seed, shared)
    q, k, v = (a.astype(dtype) for a in (q, k, v))

    def attend(q: Any, k: Any, v: Any, bias: Any) -> jax.Array:
        options = {"window": window, "bias": bias, "implementation": implementation}
        return step_attention(q, k, v, query_step, key_step, **options)

    def expected(q: Any, k: Any, v: Any, bias: Any) -> jax.Array:
        return definition(q, k, v, query_step, key_step, window, bias)

    out, gradients = jax.jit(functools.partial(value_and_gradients, attend))(q, k, v, bias)
    want, want_gradients = jax.jit(functools.partial(value_and_gradients, expected))(q, k, v, bias)
    assert out.dtype == v.dtype
    for found, right in zip((out, *gradients), (want, *want_gradients), strict=True):
        np.testing.assert_allclose(
            found.astype(jnp.float32), right.astype(jnp.float32), atol=TOLERANCE[dtype] * max(1, jnp.abs(right).max())
        )


@every_implementation
def test_rows_that_see_nothing_are_zero_with_finite_gradients(implementation: str) -> None:
    q, k, v, _, _, bias = inputs((2, 3, 4, 2, 1, 4), 0, False)
    query_step = jnp.asarray([[0, 1, 2]])
    key_step = jnp.asarray([[2, 2, 3, NEVER]])

    def attend(q: Any, k: Any, v: Any, bias: Any) -> jax.Array:
        return step_attention(q, k, v, query_step, key_step, bias=bias, implementation=implementation)

    out, gradients = jax.jit(functools.partial(value_and_gradients, attend))(q, 100 * k, v, bias[:1])
    assert not np.asarray(out[:, :2]).any() and np.asarray(out[:, 2]).any()
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)
    grad_q, grad_k, _, _ = gradients
    assert not np.asarray(grad_q[:, :2]).any()
    assert not np.asarray(grad_k[:, 2:]).any()  # keys that nobody sees


@every_implementation
def test_a_window_reads_the_last_steps_only(implementation: str) -> None:
    """With equal logits the output is the mean of the values that are seen."""
    time = 5
    v = jnp.arange(time, dtype=jnp.float32).reshape(1, time, 1, 1)
    zero, step = jnp.zeros((1, time, 1, 1)), jnp.arange(time)[None]
    means = {None: [0, 0.5, 1, 1.5, 2], 1: [0, 1, 2, 3, 4], 2: [0, 0.5, 1.5, 2.5, 3.5]}
    for window, mean in means.items():
        out = step_attention(zero, zero, v, step, step, window=window, implementation=implementation)
        np.testing.assert_allclose(out[0, :, 0, 0], mean, atol=1e-6)  # float32 means of small whole numbers


@every_implementation
def test_grouped_heads_are_repeated_key_heads_and_scale_replaces_the_default(implementation: str) -> None:
    q, k, v, query_step, key_step, bias = inputs((2, 5, 6, 4, 2, 4), 1, False)
    attend = jax.jit(functools.partial(step_attention, bias=bias, implementation=implementation))
    grouped = attend(q, k, v, query_step, key_step)
    repeated = attend(q, *(jnp.repeat(a, 2, axis=2) for a in (k, v)), query_step, key_step)
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)  # float32, the same sums
    scaled = attend(q * 3, k, v, query_step, key_step, scale=0.5 / 3)
    np.testing.assert_allclose(scaled, grouped, atol=1e-5)  # 1 / sqrt(4) is one half


def arguments(**changes: Any) -> dict[str, Any]:
    q, k, v, query_step, key_step, _ = inputs((2, 3, 5, 4, 2, 4), 0, False)
    return {"q": q, "k": k, "v": v, "query_step": query_step, "key_step": key_step} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 3, 4))}, "should be"),
        ({"q": jnp.zeros((2, 3, 3, 4))}, "N a multiple of K"),
        ({"q": jnp.zeros((2, 3, 4, 6))}, "should be"),
        ({"q": jnp.zeros((3, 3, 4, 4))}, "should be"),
        ({"v": jnp.zeros((2, 4, 2, 4))}, "should be"),
        ({"query_step": jnp.zeros((2, 5), jnp.int32)}, "query_step"),
        ({"key_step": jnp.zeros((3, 5), jnp.int32)}, "key_step"),
        ({"key_step": jnp.zeros(5, jnp.int32)}, "key_step"),
        ({"key_step": jnp.zeros((2, 5))}, "key_step"),
        ({"implementation": "referense"}, "Did you mean 'reference'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    jax.eval_shape(lambda: step_attention(**arguments()))
    with pytest.raises(ValueError, match=message):
        step_attention(**arguments(**changes))
