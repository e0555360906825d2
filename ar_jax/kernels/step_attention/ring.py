"""Attention between queries and keys that are both cut over devices: keys and values travel round (arXiv:2310.01889)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.gradient import differentiable
from ar_jax.kernels.step_attention.merge import merge
from ar_jax.kernels.step_attention.visibility import UNSEEN, Visibility

Form = Callable[..., Any]


def ring(forward: Form, backward: Form, axis: str) -> Form:
    """A form of `step_attention` for queries and keys of which each device has its part; inside `jax.shard_map`.

    Each device answers its own queries from its own keys, then from its neighbour's, and so on; what it has read of all
    of them is merged by the log-sum-exp. Its neighbour's keys come in while it still reads the ones before.

    The backward pass goes round once more: keys and values travel again, and their gradients with them, until they are
    home. Kept are a device's own arrays, its outputs and their log-sum-exp: O((T + S) / devices) memory in both passes.
    Blocks in which nothing is seen are left out by the forms, as on one device.

    Args:
      forward: a form of `step_attention`, for one device's keys.
      backward: its backward form; see `differentiable` and `backward_of`.
      axis: the mesh axis that T and S are cut over.
    """
    return differentiable(functools.partial(_forward, forward, axis), functools.partial(_backward, backward, axis))


def _forward(
    form: Form,
    axis: str,
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: Array | None,
    sinks: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    def read(hop: Any, keys: tuple[Array, ...], before: tuple[Array, Array]) -> tuple[Array, Array]:
        k, v, key = keys
        out, lse = form(q, k, v, visible.replace(key=key), _columns(bias, k, hop, axis), None, **options)  # type: ignore[attr-defined]
        return merge(jnp.stack([before[0], out.astype(jnp.float32)]), jnp.stack([before[1], lse]))

    def hop(number: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        keys, before = carry
        return _passed_on(keys, axis), read(number, keys, before)

    # A sink is a logit without a value: as if something without content had been read before the first key.
    first = jnp.full(q.shape[2:3], UNSEEN) if sinks is None else sinks.astype(jnp.float32)
    before = jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32), jnp.broadcast_to(first[None, None], q.shape[:3])
    last = jax.lax.axis_size(axis) - 1
    keys, before = jax.lax.fori_loop(0, last, hop, ((k, v, visible.key), before))
    out, lse = read(last, keys, before)
    return out.astype(v.dtype), lse


def _backward(
    form: Form,
    axis: str,
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: Array | None,
    lse: Array,
    d_out: Array,
    delta: Array,
    **options: Any,
) -> tuple[Array, Array, Array, Array | None]:
    def read(hop: Any, keys: tuple[Array, ...], sums: Any) -> Any:
        k, v, key = keys
        own, own_bias = visible.replace(key=key), _columns(bias, k, hop, axis)  # type: ignore[attr-defined]
        *grads, d_own = form(q, k, v, own, own_bias, lse, d_out, delta, **options)
        *sums, d_bias = sums
        sums = [total + grad.astype(jnp.float32) for total, grad in zip(sums, grads, strict=True)]
        if d_own is not None:
            start = _owner(hop, axis) * k.shape[1]
            d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, d_own.astype(d_bias.dtype), start, axis=3)
        return (*sums, d_bias)

    def hop(number: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        keys, sums = carry
        dq, dk, dv, d_bias = read(number, keys, sums)
        return _passed_on(keys, axis), (dq, *_passed_on((dk, dv), axis), d_bias)

    zeros = [jnp.zeros(a.shape, jnp.float32) for a in (q, k, v)]
    last = jax.lax.axis_size(axis) - 1
    sums = (*zeros, None if bias is None else jnp.zeros_like(bias))
    keys, sums = jax.lax.fori_loop(0, last, hop, ((k, v, visible.key), sums))
    dq, dk, dv, d_bias = read(last, keys, sums)
    dk, dv = _passed_on((dk, dv), axis)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_bias


def _passed_on(arrays: Any, axis: str) -> Any:
    """What the neighbour had."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(arrays, axis, [(i, (i + 1) % size) for i in range(size)])


def _owner(hop: Any, axis: str) -> Array:
    """Whose keys are here after so many hops."""
    return (jax.lax.axis_index(axis) - hop) % jax.lax.axis_size(axis)


def _columns(bias: Array | None, k: Array, hop: Any, axis: str) -> Array | None:
    """The part of a device's bias [B, N, T, S of all devices] for the keys that are here."""
    if bias is None:
        return None
    return jax.lax.dynamic_slice_in_dim(bias, _owner(hop, axis) * k.shape[1], k.shape[1], axis=3)
