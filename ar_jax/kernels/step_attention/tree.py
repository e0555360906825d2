"""Attention of a few queries to keys that lie on many devices: by a tree of reductions, or around a ring."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from ar_jax.kernels.step_attention.merge import merge

Form = Callable[[Array, Array, Array], tuple[Array, Array]]


def tree_reduce(out: Array, lse: Array, axis: str) -> tuple[Array, Array]:
    """Attention over all devices' keys from that over each one's own (tree attention, arXiv:2408.04093).

    m = max_p lse_p,   out = sum_p exp(lse_p - m) out_p / sum_p exp(lse_p - m),   lse = m + log sum_p exp(lse_p - m)

    The two sums travel as one array: two reductions of H + 1 and 1 numbers per query and head, however many keys there are.

    Args:
      out: [..., H], of this device; zeros where a query reads nothing here.
      lse: [...] float32, -1e30 there.
      axis: the mesh axis over which the keys are cut; inside `jax.shard_map`.

    Returns:
      [..., H] in the dtype of out and [...] float32, the same on all devices.
    """
    peak = jax.lax.pmax(lse, axis)
    weight = jnp.exp(lse - peak)[..., None]
    both = jnp.concatenate([weight * out.astype(jnp.float32), weight], axis=-1)
    sums = jax.lax.psum(both, axis)
    return (sums[..., :-1] / sums[..., -1:]).astype(out.dtype), peak + jnp.log(sums[..., -1])


def tree_attention(attend: Form, q: Array, k: Array, v: Array, mesh: Mesh, axis: str) -> tuple[Array, Array]:
    """Queries that every device has read keys that are cut over the devices; only what was read travels.

    Args:
      attend: (q, k, v) to out [B, T, N, H] and lse [B, T, N], of one device's keys; such as
        `step_attention(..., return_lse=True)`.
      q: [B, T, N, H], whole on each device.
      k: [B, S, K, H], S cut over `axis`.
      v: [B, S, K, H].
      mesh: of the devices.
      axis: one of its axes, whose size divides S.

    Returns:
      [B, T, N, H] and [B, T, N] float32, the same on all devices.
    """

    def own(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return tree_reduce(*attend(q, k, v), axis)

    return _over(mesh, axis, own)(q, k, v)


def ring_attention(attend: Form, q: Array, k: Array, v: Array, mesh: Mesh, axis: str) -> tuple[Array, Array]:
    """The same result by passing keys and values round (arXiv:2310.01889): all of them visit every device.

    Arguments and results are those of `tree_attention`.
    """
    size = mesh.shape[axis]
    neighbours = [(i, (i + 1) % size) for i in range(size)]

    def own(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        out, lse = attend(q, k, v)
        for _ in range(size - 1):
            k, v = (jax.lax.ppermute(a, axis, neighbours) for a in (k, v))
            more, more_lse = attend(q, k, v)
            out, lse = merge(jnp.stack([out, more]), jnp.stack([lse, more_lse]))
        return out, lse

    return _over(mesh, axis, own)(q, k, v)


def _over(mesh: Mesh, axis: str, own: Form) -> Form:
    """`own` on each device, with its part of keys and values."""
    cut, whole = PartitionSpec(None, axis), PartitionSpec()
    mapped = functools.partial(jax.shard_map, mesh=mesh, out_specs=(whole, whole), check_vma=False)
    return mapped(own, in_specs=(whole, cut, cut))
