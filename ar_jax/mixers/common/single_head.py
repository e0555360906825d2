"""One head of attention on a line: softmax or element-wise weights, over all of it or in chunks (Mega, arXiv:2209.10655)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.mixers.common.line import Line, line_index, present
from ar_jax.mixers.common.place_order import in_place_order
from ar_jax.mixers.common.short_convolution import Ring, last_values
from ar_jax.mixers.protocol import NEVER, Tokens

MEAN, DEVIATION = 0.707107, 0.282095  # sqrt(1 / 2) and sqrt(1 / (4 pi)): the best fit to relu^2 (sec. 3.2)
ATTENTIONS: dict[str, Callable[[Array], Array] | None] = {
    "softmax": None,
    "laplace": lambda x: 0.5 * (1 + jax.lax.erf((x - MEAN) / (DEVIATION * math.sqrt(2)))),
    "relu2": lambda x: jnp.square(nn.relu(x)),
}


@dataclasses.dataclass(frozen=True)
class Head:
    """How a head reads.

    Attributes:
      attention: a key of ATTENTIONS.
      chunk_size: tokens of a chunk, of which each reads its own only; 0 has one chunk.
      causal: earlier tokens are read, and the own one; otherwise all.
      bias: of the distance of a key behind its query.
    """

    attention: str
    chunk_size: int
    causal: bool
    bias: Callable[[Array], Array]

    def weights(self, products: Array, distance: Array, visible: Array) -> Array:
        """Of q . k [B, ..., T, S], given the distances and who sees whom [B or 1, ..., T, S]; float32."""
        visible = jnp.broadcast_to(visible, products.shape)
        bias = jnp.broadcast_to(self.bias(distance), products.shape)
        products = products.astype(jnp.float32)
        function = ATTENTIONS[self.attention]
        if function is None:
            logits = jnp.where(visible, products + bias, -1e30)
            return jnp.where(visible, nn.softmax(logits, axis=-1), 0)
        seen = jnp.maximum(visible.sum(axis=-1, keepdims=True), 1).astype(jnp.float32)
        return jnp.where(visible, function(products / seen + bias), 0)


def attend(
    head: Head, q: Array, k: Array, v: Array, tokens: Tokens, state: Line | Ring | None
) -> tuple[Array, Array, Any]:
    """What each token reads.

    Args:
      head: how it reads.
      q: [B, T, Z].
      k: [B, T, Z].
      v: [B, T, V].
      tokens: when and where they are.
      state: keys and values that came before, side by side; None for a whole sequence, or where the head is not causal.

    Returns:
      [B, T, V], the weights (in chunks where the sequence is cut into some), and the state after.
    """
    if head.attention == "softmax":
        q = q * q.shape[-1] ** -0.5
    if not head.causal:
        out, weights = _in_places(head, q, k, v, tokens)
        return out, weights, state
    if state is None and tokens.segment is None and tokens.num_remembered == q.shape[1]:
        out, weights = _in_chunks(head, q, jnp.concatenate([k, v], axis=-1), tokens.step < NEVER)
        return out, weights, None
    # The last channel tells where there is something to read: it is zero for padding.
    entries = present(jnp.concatenate([k, v, jnp.ones_like(k[..., :1])], axis=-1), tokens)
    read: Callable[..., tuple[Array, Array, Any]] = _in_taps if head.chunk_size else _in_line
    return read(head, q, entries, tokens, state)


def _read(weights: Array, v: Array) -> Array:
    return jnp.einsum("...ts,...sv->...tv", weights.astype(v.dtype), v)


def _in_chunks(head: Head, q: Array, entries: Array, valid: Array) -> tuple[Array, Array]:
    """A sequence cut into chunks, or in one piece; valid [B or 1, T] keys. Cost: O(T chunk_size)."""
    (batch, length, width), size = q.shape, head.chunk_size or q.shape[1]
    count = -(-length // size)

    def cut(a: Array) -> Array:
        padded = jnp.pad(a, ((0, 0), (0, count * size - length), *((0, 0),) * (a.ndim - 2)))
        return padded.reshape(len(a), count, size, *a.shape[2:])

    k, v = jnp.split(cut(entries), [width], axis=-1)
    place = jnp.arange(size)
    distance = (place[:, None] - place[None, :])[None, None]
    visible = cut(valid)[:, :, None, :]
    if head.causal:
        visible &= distance >= 0
    weights = head.weights(jnp.einsum("bctz,bcsz->bcts", cut(q), k), distance, visible)
    return _read(weights, v).reshape(batch, count * size, -1)[:, :length], weights


def _in_places(head: Head, q: Array, k: Array, v: Array, tokens: Tokens) -> tuple[Array, Array]:
    """A whole sequence in the order of its places, which everything reads; O(T^2) only where several are packed."""
    kept: list[Array] = []

    def mix(joined: Array, there: Tokens) -> Array:
        q, entries = jnp.split(joined, [k.shape[-1]], axis=-1)
        valid = there.step < NEVER
        if there.segment is None:
            out, weights = _in_chunks(head, q, entries, valid)
        else:
            index = line_index(dataclasses.replace(there, num_remembered=q.shape[1]))
            chunk = index // (head.chunk_size or q.shape[1])
            visible = (chunk[:, None, :] == chunk[:, :, None]) & valid[:, None, :]
            visible &= there.segment[:, None, :] == there.segment[:, :, None]
            keys, values = jnp.split(entries, [q.shape[-1]], axis=-1)
            distance = index[:, :, None] - index[:, None, :]
            weights = head.weights(jnp.einsum("btz,bsz->bts", q, keys), distance, visible)
            out, weights = _read(weights, values), weights[:, None]
        kept.append(weights)
        return out

    out = in_place_order(mix, jnp.concatenate([q, k, v], axis=-1), tokens)
    return out, kept[0]


def _in_line(
    head: Head, q: Array, entries: Array, tokens: Tokens, state: Line | None
) -> tuple[Array, Array, Line | None]:
    """Everything that came before, and the own token. Cost: O(T S)."""
    n, width = tokens.num_remembered, q.shape[-1]
    index = line_index(tokens, 0 if state is None else state.count)
    if state is None:
        known, key_index = entries[:, :n], index[:, :n]
    else:
        state = state.append(entries[:, :n])
        known, key_index = state.values, jnp.arange(state.values.shape[1], dtype=jnp.int32)[None]
    distance = index[:, :, None] - key_index[:, None, :]
    visible = (distance > 0) & (known[..., -1] > 0)[:, None, :]
    if tokens.segment is not None:
        visible &= tokens.segment[:, None, :n] == tokens.segment[:, :, None]
    products = jnp.einsum("btz,bsz->bts", q, known[..., :width])
    own = (q * entries[..., :width]).sum(axis=-1, keepdims=True)
    # The own token stands last, for a query is none of those that are known.
    visible = jnp.concatenate([visible, jnp.ones_like(visible[..., :1])], axis=-1)
    distance = jnp.concatenate([distance, jnp.zeros_like(distance[..., :1])], axis=-1)
    weights = head.weights(jnp.concatenate([products, own], axis=-1), distance, visible)
    read = _read(weights[..., :-1], known[..., width:-1]) + weights[..., -1:].astype(q.dtype) * entries[..., width:-1]
    return read, weights, state


def _in_taps(
    head: Head, q: Array, entries: Array, tokens: Tokens, state: Ring | None
) -> tuple[Array, Array, Ring | None]:
    """The own chunk so far, gathered for each token: for pieces, queries and packed segments. Cost: O(T chunk_size)."""
    size, width = head.chunk_size, q.shape[-1]
    index = line_index(tokens, 0 if state is None else state.count) % size
    taps, state = last_values(entries, size, tokens, state)  # [B, T, size, Z + V + 1], the own token's first
    distance = jnp.arange(size, dtype=jnp.int32)[None, None]
    visible = (distance <= index[..., None]) & (taps[..., -1] > 0)
    weights = head.weights(jnp.einsum("btz,btsz->bts", q, taps[..., :width]), distance, visible)
    return jnp.einsum("bts,btsv->btv", weights.astype(q.dtype), taps[..., width:-1]), weights, state
