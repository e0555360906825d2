"""The matrix product of activations and weights: jnp.matmul, written so that each platform has it cheaply."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ar_jax.kernels.dense import Dense, dot_general

LAST = (((2,), (0,)), ((), ()))


def product(x: Any, w: Any) -> jax.Array:
    return dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 1, 4, 3)], ids=str)
def test_it_is_matmul_in_value_and_gradient(shape: tuple[int, ...]) -> None:
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((shape, (3, 5))))
    uneven = jnp.cos(jnp.arange(np.prod(shape[:-1]) * 5)).reshape(*shape[:-1], 5)

    def both(multiply: Any) -> Any:
        return jax.value_and_grad(lambda x, w: (multiply(x, w) * uneven).sum(), argnums=(0, 1))(x, w)

    np.testing.assert_allclose(product(x, w), x @ w, atol=1e-6)  # float32 sums of three
    for found, right in zip(jax.tree.leaves(both(product)), jax.tree.leaves(both(jnp.matmul)), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)  # float32 sums of eight


def test_other_contractions_are_those_of_lax() -> None:
    x, y = (jax.random.normal(jax.random.key(i), (2, 4, 3)) for i in range(2))
    batched = (((2,), (2,)), ((0,), (0,)))
    np.testing.assert_array_equal(dot_general(x, y, batched), jax.lax.dot_general(x, y, batched))


def lowered(platform: str) -> str:
    x, w = jnp.zeros((2, 4, 3)), jnp.zeros((3, 5))
    function = jax.jit(jax.grad(lambda x, w: jnp.square(product(x, w)).sum(), argnums=(0, 1)))
    return function.trace(x, w).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
def test_cpus_keep_them_apart_where_the_mesh_cuts_sequences() -> None:
    """Examples and tokens in one axis would be brought together on every device."""
    with jax.set_mesh(jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,))):
        assert "tensor<8x" not in lowered("cpu")


def test_accelerators_keep_the_leading_axes_apart_and_cpus_merge_them() -> None:
    """Merged axes could not be sharded each on its own."""
    products = {
        platform: [line for line in lowered(platform).splitlines() if "stablehlo.dot_general" in line]
        for platform in ("tpu", "cuda", "cpu")
    }
    assert all(len(lines) == 3 for lines in products.values())  # forward, and two gradients
    for platform, lines in products.items():
        merged = ["tensor<8x" in line for line in lines]  # 2 x 4 rows
        assert all(merged) if platform == "cpu" else not any(merged)


def test_the_accumulator_may_be_wider_than_the_arguments() -> None:
    x, w = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
    out = dot_general(x, w, LAST, preferred_element_type=jnp.float32)
    assert out.dtype == jnp.float32 and dot_general(x, w, LAST).dtype == jnp.bfloat16


def test_dense_is_a_layer_on_it() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 4, 3))
    layer = Dense(5)
    params = layer.init(jax.random.key(1), x)
    np.testing.assert_allclose(layer.apply(params, x), x @ params["params"]["kernel"], atol=1e-6)  # float32, bias zero
