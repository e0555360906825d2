"""Linear attention: fast forms against the equation, in value, gradient and final state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ar_jax.kernels.linear_attention import IMPLEMENTATIONS, linear_attention

FAST = sorted(set(IMPLEMENTATIONS) - {"reference"})
# float32: sums of 20 products of order one, in another order. bfloat16 rounds scores and keys to 8 bits: 1/256 each.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def inputs(batch: int, time: int, heads: int, dim: int, width: int, decay: str, seed: int) -> dict[str, Any]:
    """Arguments; `decay` is "none", "head", "token" or "strong": some tokens forget all but e^-50 of what came before."""
    r = np.random.default_rng(seed)
    q, k, v, start = (
        jnp.asarray(r.normal(size=shape), jnp.float32)
        for shape in (*[(batch, time, heads, dim)] * 2, (batch, time, heads, width), (batch, heads, dim, width))
    )
    log_decay: Any = None
    if decay != "none":
        log_decay = -r.uniform(0, 1, (heads,) if decay == "head" else (batch, time, heads))
    if decay == "strong":
        log_decay = np.where(r.random(log_decay.shape) < 0.5, -50.0, log_decay)
    log_decay = None if log_decay is None else jnp.asarray(log_decay, jnp.float32)
    return {"q": q, "k": k, "v": v, "log_decay": log_decay, "initial_state": start}


def results(inputs: dict[str, Any], **options: Any) -> Any:
    """Outputs and final state, and the gradients of an uneven sum of both by all inputs."""

    def loss(inputs: dict[str, Any]) -> tuple[jax.Array, Any]:
        both = linear_attention(**inputs, **options)
        uneven = [(a.astype(jnp.float32) * jnp.cos(jnp.arange(a.size)).reshape(a.shape)).sum() for a in both]
        return sum(uneven), both

    gradients, both = jax.grad(loss, has_aux=True)(inputs)
    return both, gradients


def assert_close(found: Any, right: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max(initial=0)), rtol=0)


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=7, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking compiles for minutes
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    st.sampled_from([None, 1, 4, 7]),
    st.sampled_from(["none", "head", "token", "strong"]),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 1000),
)
def test_the_fast_form_is_the_equation_in_value_gradient_and_state(
    implementation: str, sizes: Any, chunk_size: int | None, decay: str, starts: bool, dtype: str, seed: int
) -> None:
    given_inputs = inputs(*sizes, decay, seed)
    given_inputs |= {name: given_inputs[name].astype(dtype) for name in ("q", "k", "v")}
    given_inputs["initial_state"] = given_inputs["initial_state"] if starts else None
    fast = functools.partial(results, implementation=implementation, chunk_size=chunk_size)
    found = jax.jit(fast)(given_inputs)
    right = jax.jit(functools.partial(results, implementation="reference"))(given_inputs)
    assert found[0][0].dtype == dtype and found[0][1].dtype == jnp.float32
    assert_close(found, right, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_equation_is_the_one_of_the_docstring(implementation: str) -> None:
    """In numpy, one token after the other."""
    args = inputs(2, 5, 2, 3, 4, "token", 0)
    q, k, v, log_decay, state = (np.asarray(args[n]) for n in ("q", "k", "v", "log_decay", "initial_state"))
    out, final = jax.jit(functools.partial(linear_attention, implementation=implementation))(**args)
    for t in range(5):
        state = np.exp(log_decay[:, t])[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        np.testing.assert_allclose(out[:, t], np.einsum("bnhe,bnh->bne", state, q[:, t]), atol=1e-5)  # float32
    np.testing.assert_allclose(final, state, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("log_decay", [-50.0, -1000.0, 0.0])
def test_any_decay_gives_finite_values_and_gradients(implementation: str, log_decay: float) -> None:
    """exp of the sum of 40 decays of -50 is zero, and of its negative infinite: the quotient of the two must not be formed."""
    args = inputs(1, 40, 1, 3, 3, "none", 0) | {"log_decay": jnp.full((1, 40, 1), log_decay)}
    (out, state), gradients = jax.jit(functools.partial(results, implementation=implementation))(args)
    assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves((out, state, gradients)))
    if log_decay < 0:  # each token reads itself alone
        own = jnp.einsum("btnh,btnh,btne->btne", args["q"], args["k"], args["v"])
        np.testing.assert_allclose(out, own, atol=1e-5)  # float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [1, 6])
def test_the_state_continues_a_sequence(implementation: str, cut: int) -> None:
    args = inputs(2, 13, 2, 3, 4, "token", 0)
    attend = jax.jit(functools.partial(linear_attention, implementation=implementation, chunk_size=4))
    whole, last = attend(**args)
    state, pieces = args["initial_state"], []
    for piece in (slice(0, cut), slice(cut, None)):
        out, state = attend(**{n: args[n][:, piece] for n in ("q", "k", "v", "log_decay")}, initial_state=state)
        pieces.append(out)
    assert_close((jnp.concatenate(pieces, axis=1), state), (whole, last), 1e-5)  # float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 5, 2))}, "should be"),
        ({"k": jnp.zeros((2, 5, 2, 4))}, "should be"),
        ({"v": jnp.zeros((2, 4, 2, 4))}, "should be"),
        ({"log_decay": jnp.zeros(3)}, "log_decay"),
        ({"log_decay": jnp.zeros((2, 5))}, "log_decay"),
        ({"implementation": "xl"}, "Did you mean 'xla'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**inputs(2, 5, 2, 3, 4, "token", 0) | changes)
