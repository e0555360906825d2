"""The ring, with causal work spread evenly: each device has an early and a late part of the sequence (arXiv:2407.21783)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.visibility import Visibility

Form = Callable[..., Any]


def zigzag(form: Form, axis: str) -> Form:
    """A form like `ring` that lays tokens out anew before it and back after it; inside `jax.shard_map`.

    Where later tokens read all earlier ones, the first device has the least to read and the last the most, and at every
    hop of the ring all wait for the last. Of 2n halves of the devices' parts in their order, device i has 2i and 2i + 1; it
    keeps the first, and gives the second to device n - 1 - i for that one's. With 2i and 2n - 1 - 2i it reads as much as any
    other, and at every hop two of the four pairs of halves. Any other pairing of sum 2n - 1 does the same (llama 3 has i and
    2n - 1 - i; arXiv:2311.09431 deals tokens out one by one instead); this one is its own inverse and sends a half only.

    Nothing else changes, as who reads whom is data. What is sent besides: a half of q, k, v and out, and of their gradients.

    Args:
      form: `ring`'s.
      axis: the mesh axis that T and S are cut over.
    """

    def read(
        q: Array, k: Array, v: Array, visible: Visibility, bias: Array | None, sinks: Array | None, **options: Any
    ) -> tuple[Array, Array]:
        q, k, v = (exchanged(a, axis) for a in (q, k, v))
        lower, upper, key = (exchanged(a, axis, 2) for a in (visible.lower, visible.upper, visible.key))
        visible = Visibility(lower, upper, key, visible.has_lower)
        if bias is not None:
            bias = exchanged(_columns(bias, k.shape[1]), axis, 2)
        out, lse = form(q, k, v, visible, bias, sinks, **options)
        return exchanged(out, axis), exchanged(lse, axis)

    return read


def exchanged(a: Array, axis: str, along: int = 1) -> Array:
    """The first half of this device's axis, and the second half of the device as far from the other end; its own inverse."""
    size, middle = jax.lax.axis_size(axis), a.shape[along] // 2
    first, second = jnp.split(a, [middle], axis=along)
    second = jax.lax.ppermute(second, axis, [(i, size - 1 - i) for i in range(size)])
    return jnp.concatenate([first, second], axis=along)


def _columns(bias: Array, length: int) -> Array:
    """[B, N, T, S of all devices], the columns as the devices' keys lie now, of which each has `length`."""
    parts = bias.reshape(*bias.shape[:3], -1, length)
    first, second = jnp.split(parts, [length // 2], axis=4)
    return jnp.concatenate([first, second[:, :, :, ::-1]], axis=4).reshape(bias.shape)
