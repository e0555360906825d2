"""SparseK's operator: a projection, its derivative, and sets that only shrink."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels.sparsek import sparsek


def bisected(z: np.ndarray, k: float) -> np.ndarray:
    """The projection of a vector of more than k entries, from its definition in float64."""
    low, high = z.min() - 1.0, z.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(z - middle, 0, 1).sum() > k else (low, middle)
    return np.clip(z - low, 0, 1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("k", [1, 2.5, 6])
def test_it_is_the_nearest_point_of_the_hypersimplex(k: float, scale: float) -> None:
    z = scale * np.random.default_rng(0).normal(size=(5, 9))
    found, tau = jax.jit(sparsek, static_argnums=1)(jnp.asarray(z, jnp.float32), k)
    np.testing.assert_allclose(found, [bisected(row, k) for row in z], atol=1e-6 * max(scale, 1))  # float32 of z
    np.testing.assert_allclose(found.sum(axis=-1), k, atol=1e-4)  # sums of nine such
    np.testing.assert_allclose(found, np.clip(z - np.asarray(tau)[:, None], 0, 1), atol=1e-6 * max(scale, 1))


def test_its_derivative_is_that_of_finite_differences() -> None:
    z = np.random.default_rng(1).normal(size=12) * 0.5
    found = jax.jacobian(lambda z: sparsek(z, 3)[0])(jnp.asarray(z, jnp.float32))
    steps = 1e-6 * np.eye(12)
    expected = np.stack([(bisected(z + step, 3) - bisected(z - step, 3)) / 2e-6 for step in steps], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # of differences of float64 numbers 1e-6 apart


def test_few_entries_are_all_read_and_unseen_ones_never() -> None:
    z = jnp.asarray([[3.0, -2.0, 7.0, 1.0]])
    seen = jnp.asarray([[True, True, False, False]])
    np.testing.assert_array_equal(sparsek(z, 2, seen)[0], [[1, 1, 0, 0]])
    np.testing.assert_array_equal(sparsek(z, 2, jnp.zeros((1, 4), bool))[0], 0)
    np.testing.assert_allclose(sparsek(z, 1, seen)[0], [[1, 0, 0, 0]], atol=1e-6)


def test_what_is_left_out_once_is_never_read_again() -> None:
    z = jax.random.normal(jax.random.key(0), (16, 30))
    prefixes = jnp.tril(jnp.ones((30, 30), bool))[None]
    shares, _ = sparsek(jnp.broadcast_to(z[:, None], (16, 30, 30)), 4, prefixes)
    read = np.asarray(shares > 0) | ~np.asarray(prefixes)
    assert (read[:, 1:] <= read[:, :-1]).all()
