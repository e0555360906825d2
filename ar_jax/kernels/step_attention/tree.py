"""Attention of queries that every device has to keys that are cut over devices: only what was read travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.visibility import UNSEEN, Visibility

Form = Callable[..., Any]


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
    peak = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)  # what is taken out of the sums comes back: no gradient
    weight = jnp.exp(lse - peak)[..., None]
    both = jnp.concatenate([weight * out.astype(jnp.float32), weight], axis=-1)
    sums = jax.lax.psum(both, axis)
    return (sums[..., :-1] / sums[..., -1:]).astype(out.dtype), peak + jnp.log(sums[..., -1])


def tree(form: Form, axis: str) -> Form:
    """A form of `step_attention` for queries that every device has and keys of which each has its part.

    Args:
      form: a form of `step_attention`, for one device's keys.
      axis: the mesh axis that S is cut over; inside `jax.shard_map`.
    """

    def read(
        q: Array, k: Array, v: Array, visible: Visibility, bias: Array | None, sinks: Array | None, **options: Any
    ) -> tuple[Array, Array]:
        if sinks is not None:  # in every softmax once
            sinks = jnp.where(jax.lax.axis_index(axis) == 0, sinks, UNSEEN)
        out, lse = form(q, k, v, visible, bias, sinks, **options)
        return tree_reduce(out, lse, axis)

    return read
