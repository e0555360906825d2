"""Recurrences over sequences that are cut over devices: tokens stay where they are, states are passed on.

A state after some tokens is linear in the one before them, S' = F S + A. Every device finds F and A of its own tokens, a
scan over the devices (in logarithmically many rounds of messages of a state's size, whatever the length) gives each the
state before its first token, and from there it reads. All of this is differentiated by JAX; inside `jax.shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Form = Callable[..., tuple[Array, Array]]


def carried(
    product: Callable[[Array, Array], Array], factor: Array, added: Array, initial: Array, axis: str
) -> tuple[Array, Array]:
    """The states before and after each device's part of a sequence, S' = F S + A in every part.

    Args:
      product: F S, and F F' of two parts: `jnp.multiply` where F is diagonal, or `jnp.matmul`.
      factor: F of this device's part.
      added: A.
      initial: the state before the first device's part, the same on all devices.
      axis: the mesh axis that sequences are cut over.

    Returns:
      The state before this device's part, and the one after the last device's part, the same on all devices.
    """
    size, place = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    reach = 1  # factor and added are those of so many parts, this device's the last of them
    while reach < size:
        forward = [(i, i + reach) for i in range(size - reach)]
        earlier, earlier_added = jax.lax.ppermute((factor, added), axis, forward)  # zeros where there is none
        added = added + product(factor, earlier_added)
        factor = jnp.where(place >= reach, product(factor, earlier), factor)
        reach *= 2
    after = product(factor, initial) + added
    before = jax.lax.ppermute(after, axis, [(i, i + 1) for i in range(size - 1)])
    last = jax.lax.psum(jnp.where(place == size - 1, after, 0), axis)
    return jnp.where(place == 0, initial, before), last


def linear(form: Form, axis: str) -> Form:
    """`linear_attention` of this device's tokens by one of its forms; all its states have decayed channel by channel."""

    def read(k: Array, v: Array, log_decay: Array | None, initial_state: Array, **rest: Any) -> tuple[Array, Array]:
        batch, length, heads, _ = k.shape
        decay = jnp.zeros(heads) if log_decay is None else log_decay
        decay = jnp.broadcast_to(decay[None, None], (batch, length, heads)) if decay.ndim == 1 else decay
        decay = decay[..., None] if decay.ndim == 3 else decay  # [B, T, N, H or 1]
        from_here = jax.lax.cumsum(decay, axis=1, reverse=True)
        to_end = jnp.concatenate([from_here[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
        added = jnp.einsum("btnh,btne->bnhe", k * jnp.exp(to_end), v.astype(jnp.float32))
        before, after = carried(jnp.multiply, jnp.exp(from_here[:, 0])[..., None], added, initial_state, axis)
        out, _ = form(k=k, v=v, log_decay=log_decay, initial_state=before, **rest)
        return out, after

    return read


def delta(form: Form, axis: str) -> Form:
    """`delta_attention` or `dplr_attention` of this device's tokens by one of their forms.

    The factor is a matrix that is nowhere written down; it is what a memory becomes that begins as the identity and is
    given no values. Such a memory's columns stand beside those of the true one, and what the queries read in them is what
    they read of whatever came before.
    """

    def read(v: Array, initial_state: Array, **rest: Any) -> tuple[Array, Array]:
        batch, heads, dim, width = initial_state.shape
        wide = jnp.concatenate([v, jnp.zeros((*v.shape[:3], dim), v.dtype)], axis=-1)
        identity = jnp.broadcast_to(jnp.eye(dim)[None, None], (batch, heads, dim, dim))
        start = jnp.concatenate([jnp.zeros_like(initial_state), identity], axis=-1)
        out, state = form(v=wide, initial_state=start, **rest)
        before, after = carried(jnp.matmul, state[..., width:], state[..., :width], initial_state, axis)
        earlier = jnp.einsum("btnh,bnhe->btne", out[..., width:].astype(jnp.float32), before)
        return (out[..., :width] + earlier).astype(v.dtype), after

    return read


def scan(form: Form, axis: str) -> Form:
    """`selective_scan` of this device's tokens by one of its forms, which goes over them twice: the second time it reads."""

    def read(delta: Array, a: Array, initial_state: Array, **rest: Any) -> tuple[Array, Array]:
        _, added = form(delta=delta, a=a, initial_state=jnp.zeros_like(initial_state), **rest)
        factor = jnp.exp(delta.astype(jnp.float32).sum(axis=1)[..., None] * a.astype(jnp.float32)[None])
        before, after = carried(jnp.multiply, factor, added, initial_state, axis)
        y, _ = form(delta=delta, a=a, initial_state=before, **rest)
        return y, after

    return read
