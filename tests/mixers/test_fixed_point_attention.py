"""Attention to a fixed point: its gradient is that of the iterations, and inputs take as many as they need."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers.fixed_point_attention import FixedPointAttention
from ar_jax.mixers.protocol import Tokens

DIM, LENGTH = 8, 5
MIXER = FixedPointAttention(DIM, num_heads=2, tolerance=1e-6, max_iterations=60)
ALONE = dataclasses.replace(MIXER, residual=False)


def tokens_of(length: int) -> Tokens:
    step = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(step, step[..., None], length)


def params_of(scale: float) -> Any:
    x = jnp.zeros((1, LENGTH, DIM))
    params = jax.jit(lambda x: MIXER.init(jax.random.key(1), x, tokens_of(LENGTH)))(x)
    return jax.tree.map(lambda a: scale * a, params)


def unrolled(params: Any, x: jax.Array, iterations: int, residual: bool) -> jax.Array:
    """The equation, iterated so often."""
    kernels = {name: leaf["kernel"] for name, leaf in params["params"].items()}

    def heads(a: jax.Array) -> jax.Array:
        return a.reshape(*a.shape[:2], 2, -1)

    def step(z: jax.Array, _: None) -> tuple[jax.Array, None]:
        read = x + z if residual else z
        q, k, v = heads(read @ kernels["query"]), heads(read @ kernels["key"]), heads(x @ kernels["value"])
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) * (DIM // 2) ** -0.5)
        return jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(x.shape) @ kernels["out"], None

    return jax.lax.scan(step, jnp.zeros_like(x) if residual else x, length=iterations)[0]


@pytest.mark.parametrize(("mixer", "scale"), [(MIXER, 1.0), (ALONE, 1.5)], ids=["x + z", "z"])
def test_its_value_and_gradient_are_those_of_the_unrolled_iteration(mixer: FixedPointAttention, scale: float) -> None:
    params, x = params_of(scale), jax.random.normal(jax.random.key(0), (2, LENGTH, DIM))
    cotangent = jax.random.normal(jax.random.key(2), x.shape)

    def implicit(params: Any, x: jax.Array) -> jax.Array:
        return (mixer.apply(params, x, tokens_of(LENGTH))[0] * cotangent).sum()  # type: ignore[operator]

    def iterated(params: Any, x: jax.Array, count: int) -> jax.Array:
        return (unrolled(params, x, count, mixer.residual) * cotangent).sum()

    found = jax.jit(jax.value_and_grad(implicit, argnums=(0, 1)))(params, x)
    expected = jax.jit(jax.value_and_grad(lambda params, x: iterated(params, x, 60), argnums=(0, 1)))(params, x)
    once = jax.jit(lambda params, x: iterated(params, x, 1))(params, x)
    assert abs(float(once - expected[0])) > 0.1  # the fixed point is elsewhere than one pass of attention
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected
    )  # tolerances of both solutions


def test_easier_inputs_take_fewer_iterations_by_themselves_and_in_a_batch() -> None:
    """Tokens that are nearly alike leave attention little to choose: whatever the weights, the mixture is the same."""
    params, x = params_of(1.0), jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
    alike = x[:, :1] + 0.01 * x
    solve = jax.jit(lambda x: MIXER.apply(params, x, tokens_of(LENGTH), method="solve"))
    together, counts = solve(jnp.concatenate([alike, x]))
    alone = [solve(a) for a in (alike, x)]
    assert [int(count[0]) for _, count in alone] == counts.tolist()
    assert counts[0] < counts[1] < MIXER.max_iterations
    np.testing.assert_allclose(together, np.concatenate([z for z, _ in alone]), atol=1e-5)  # float32


@pytest.mark.parametrize("options", [dict(tolerance=0.0), dict(max_iterations=0), dict(damping=1.5)])
def test_iterations_that_cannot_end_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be above 0, max_iterations"):
        mixer = FixedPointAttention(DIM, num_heads=2, **options)
        jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, tokens_of(2)), jnp.zeros((1, 2, DIM)))
