"""A fixed point and its gradient: iterated until nothing moves, differentiated as an implicit function (arXiv:1909.01377)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Update = Callable[[Any, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def fixed_point(update: Update, theta: Any, start: Array, tolerance: float, max_iterations: int) -> tuple[Array, Array]:
    """z = update(theta, z), each example iterated by itself: one that no longer moves is left as it is.

    dz/dtheta = (1 - J)^-1 d update/dtheta, J = d update/dz: the gradient g is solved for as the fixed point of
    u = g + J^T u, with the same tolerance, so memory does not grow with the iterations. It is exact where both converge.

    Args:
      update: (theta, z [B, ...]) to [B, ...]; closes over nothing that is traced.
      theta: any arrays, among them all that update reads.
      start: [B, ...] float, the first z; the fixed point is taken not to depend on it.
      tolerance: an example is done when |z' - z| <= tolerance |z'|, Euclidean norms over all but the first axis.
      max_iterations: and at the latest after so many.

    Returns:
      z, [B, ...], and [B] int32, after how many iterations each example was done.
    """
    return _iterated(functools.partial(update, theta), start, tolerance, max_iterations)


def _iterated(step: Callable[[Array], Array], start: Array, tolerance: float, most: int) -> tuple[Array, Array]:
    axes = tuple(range(1, start.ndim))

    def norm(a: Array) -> Array:
        return jnp.sqrt(jnp.square(a.astype(jnp.float32)).sum(axis=axes))

    def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        z, count, moves = carry
        new = step(z)
        kept = moves.reshape(-1, *[1] * len(axes))
        still = norm(new - z) > tolerance * norm(new)
        return jnp.where(kept, new, z), count + moves, moves & still & (count + 1 < most)

    count = jnp.zeros(len(start), jnp.int32)
    z, count, _ = jax.lax.while_loop(lambda carry: carry[2].any(), body, (start, count, jnp.ones(len(start), bool)))
    return z, count


def _forward(update: Update, theta: Any, start: Array, tolerance: float, max_iterations: int) -> Any:
    z, count = fixed_point(update, theta, start, tolerance, max_iterations)
    return (z, count), (theta, z)


def _backward(update: Update, tolerance: float, max_iterations: int, kept: Any, cotangent: Any) -> Any:
    theta, z = kept
    _, pull = jax.vjp(functools.partial(update, theta), z)
    u, _ = _iterated(lambda u: cotangent[0] + pull(u)[0], cotangent[0], tolerance, max_iterations)
    (d_theta,) = jax.vjp(lambda theta: update(theta, z), theta)[1](u)
    return d_theta, jnp.zeros_like(z)


fixed_point.defvjp(_forward, _backward)
