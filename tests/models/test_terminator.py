"""Terminator: pooling, kernels of their own for each example, and that it learns without residuals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ar_jax.config import UsageError
from ar_jax.models.vision.terminator import LocalHyperZZW, Terminator, _pooling


def test_taps_see_parts_of_the_image_that_cover_it() -> None:
    np.testing.assert_allclose(_pooling(5, 3) @ np.arange(5), [0.5, 2.0, 3.5])
    np.testing.assert_allclose(_pooling(6, 3) @ np.arange(6), [0.5, 2.5, 4.5])


@pytest.mark.parametrize("batch_kernels", [False, True])
def test_each_example_has_kernels_of_its_own_unless_as_published(batch_kernels: bool) -> None:
    """Contexts of the examples are exchanged, their images are not: only shared kernels stay the same."""
    local, (context, x) = LocalHyperZZW(3, batch_kernels), jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))
    params = local.init(jax.random.key(1), context, x)
    apply = jax.jit(local.apply)
    same = np.allclose(apply(params, context, x), apply(params, context[::-1], x), atol=1e-5)
    assert same == batch_kernels


@pytest.mark.slow
def test_it_learns_digits_without_residuals() -> None:
    data = load_digits()
    images, labels = jnp.asarray(data.images[:32, ..., None] / 8 - 1, jnp.float32), jnp.asarray(data.target[:32])
    model = Terminator(10, (12, 1), ((), (0,)), kernel_sizes=(3, 3, 3, 3), hidden_dim=4)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def loss(params: Any) -> jax.Array:
        logits, slow = model.apply({"params": params}, images)
        return -jax.nn.log_softmax(logits)[jnp.arange(32), labels].mean() + slow

    def step(params: Any, _: None) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(loss)(params)
        size = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradient)))
        return jax.tree.map(lambda p, g: p - 0.5 * g / size, params, gradient), (value, gradient)

    _, (values, gradients) = jax.jit(lambda params: jax.lax.scan(step, params, None, 20))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), jax.tree_util.keystr(path)
    assert values[-3:].mean() < 0.85 * values[0]


def test_images_must_be_square() -> None:
    with pytest.raises(UsageError, match="must be square, not 4x5"):
        jax.eval_shape(Terminator(10).init, jax.random.key(0), jnp.zeros((1, 4, 5, 1)))
