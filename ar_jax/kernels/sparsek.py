"""SparseK: the projection onto the k-hypersimplex, a differentiable top-k (arXiv:2406.16747, sec. 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.visibility import UNSEEN


def sparsek(z: Array, k: float, seen: Array | None = None) -> tuple[Array, Array]:
    """argmin_p |p - z|^2 with 0 <= p <= 1 and sum p = k, which is p = clip(z - tau, 0, 1).

    The derivative of p is the identity less its mean on the entries strictly between 0 and 1, and zero elsewhere.

    Args:
      z: [..., S] scores.
      k: what p sums to, above 0.
      seen: [..., S] bool, which entries there are; None for all. The others get 0.

    Returns:
      p [..., S] float32 and tau [...] float32. Where there are no more than k entries, all are 1, and tau is one below the
      least of them (0 where there is none).

    Cost: O(S log S), a sort.
    """
    z = z.astype(jnp.float32)
    seen = jnp.ones(z.shape, bool) if seen is None else jnp.broadcast_to(seen, z.shape)
    fixed = jnp.where(seen, jax.lax.stop_gradient(z), UNSEEN)
    rough = _threshold(fixed, k)[..., None]
    inside = seen & (fixed > rough) & (fixed - 1 < rough)
    ones = (seen & (fixed - 1 >= rough)).sum(axis=-1)
    count = inside.sum(axis=-1)
    # The same threshold as a mean over the entries inside: exact, and its derivative is that of the projection.
    tau = (jnp.where(inside, z, 0).sum(axis=-1) + ones - k) / jnp.maximum(count, 1)
    tau = jnp.where(count > 0, tau, rough[..., 0])
    few = seen.sum(axis=-1) <= k
    least = jnp.where(seen, z, jnp.inf).min(axis=-1)
    tau = jnp.where(few, jnp.where(jnp.isfinite(least), jax.lax.stop_gradient(least) - 1, 0), tau)
    p = jnp.clip(jnp.where(seen, z, 0) - tau[..., None], 0, 1)
    return jnp.where(seen, jnp.where(few[..., None], 1, p), 0), tau


def _threshold(z: Array, k: float) -> Array:
    """tau [...] with sum clip(z - tau, 0, 1) = k, of z [..., S].

    As tau falls, the sum grows by one for each z_i passed and by one less for each z_i - 1: it is linear between them.
    """
    edges = jnp.concatenate([z, z - 1], axis=-1)
    slopes = jnp.concatenate([jnp.ones_like(z), -jnp.ones_like(z)], axis=-1)
    order = jnp.argsort(-edges, axis=-1)
    edges, slopes = (jnp.take_along_axis(a, order, axis=-1) for a in (edges, slopes))
    slope = jnp.cumsum(slopes, axis=-1)  # behind each edge
    gaps = edges[..., :-1] - edges[..., 1:]
    sums = jnp.cumsum(jnp.where(slope[..., :-1] > 0, slope[..., :-1] * gaps, 0), axis=-1)  # at the edges but the first
    last = jnp.minimum((sums < k).sum(axis=-1, keepdims=True), sums.shape[-1] - 1)
    at, rate, total = (jnp.take_along_axis(a, last, axis=-1) for a in (edges[..., 1:], slope[..., :-1], sums))
    return (at + (total - k) / jnp.maximum(rate, 1))[..., 0]
