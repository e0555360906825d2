"""Stochastically subsampled attention (SSA, arXiv:2306.01705): training reads a random part of the keys, testing all."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.selected_attention.xla import masked_softmax
from ar_jax.mixers.common.key_line import in_time
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads
from ar_jax.mixers.softmax import Cache, Softmax


class Subsampled(nn.Module):
    """Softmax attention whose keys are shuffled in training, block b of queries reading block b of what came out.

    o_i = softmax over the visible keys of s^{-1}(block of i), and i itself; s sorts index + spread window u, u uniform in
    [-1, 1] for each key, so that keys of nearby tokens are read more often; without a spread all are read as often. A
    permutation is drawn for each layer and step, where the rng "dropout" is given; without it, this is `Softmax`. What is
    drawn is a sub-model: their mean at test is `ar_jax.evaluation.ensemble`.

    Attributes:
      window: keys that a token reads in training.
      spread: how far keys travel, in windows; 0: anywhere.
      num_heads: this and what follows: see Softmax.
    """

    embed_dim: int
    window: int = 64
    spread: float = 0.0
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10000.0
    qk_norm: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def _softmax(self, **more: Any) -> Softmax:
        names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "rope_base", "qk_norm", "dtype", "param_dtype")
        return Softmax(**{name: getattr(self, name) for name in names}, **more)

    def setup(self) -> None:
        """Softmax attention."""
        if self.window < 1 or self.spread < 0:
            raise UsageError(
                f"config.model.mixer: window={self.window} must be at least 1, and spread={self.spread} at least 0."
            )
        self.softmax = self._softmax()

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Cache:
        """See Softmax."""
        return self._softmax(parent=None).init_state(batch_size, max_len, max_step_len)

    def __call__(self, x: Array, tokens: Tokens, state: Cache | None = None) -> tuple[Array, Cache | None]:
        """See Mixer."""
        length = x.shape[1]
        if state is not None or not self.has_rng("dropout") or length <= self.window or self.is_initializing():
            return self.softmax(x, tokens, state)
        remembered = jnp.broadcast_to(jnp.arange(length)[None] < tokens.num_remembered, (len(x), length))
        labels = {
            "step": tokens.step,
            "segment": jnp.zeros_like(tokens.step) if tokens.segment is None else tokens.segment,
        }
        labels = {name: jnp.broadcast_to(a, remembered.shape) for name, a in labels.items()} | {"there": remembered}
        everything = self.softmax.entries(x, dataclasses.replace(tokens, num_remembered=length))
        k, v = (jnp.swapaxes(a, 1, 2) for a in (everything.k, everything.v))
        (q, k, v, labels), _, _, back = in_time((self.softmax.queries(x, tokens), k, v, labels), tokens)
        place = jnp.arange(length, dtype=jnp.float32)
        reach = self.spread * self.window if self.spread else 1e9
        order = jnp.argsort(place + reach * jax.random.uniform(self.make_rng("dropout"), (length,), minval=-1.0))
        out = attend_in_blocks(q, k, v, labels, order, self.window)
        return self.softmax.out(merge_heads(back(out))), None


def attend_in_blocks(q: Array, k: Array, v: Array, labels: dict[str, Array], order: Array, size: int) -> Array:
    """Block b of the queries reads block b of the keys in this order, and each query itself.

    Args:
      q: [B, T, N, H].
      k: [B, T, K, H].
      v: [B, T, K, H].
      labels: step, segment [B, T] int32, and which tokens are there to be read, [B, T] bool.
      order: [T] int32, a permutation.
      size: of a block.

    Returns:
      [B, T, N, H], zeros where a query reads nothing.

    Cost: O(T size H) FLOPs for each example and head.
    """
    batch, length, heads, _ = q.shape
    shared, pad = k.shape[2], -length % size

    def blocks(a: Array, fill: int = 0) -> Array:
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2), constant_values=fill)
        return a.reshape(batch, -1, size, *a.shape[2:])

    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    asking = {"step": blocks(labels["step"], NEVER), "segment": blocks(labels["segment"]), "place": blocks(place)}
    read = {"step": labels["step"], "segment": labels["segment"], "place": place}
    read = {name: blocks(a[:, order], NEVER) for name, a in read.items()}
    there = blocks(labels["there"][:, order] & (labels["step"][:, order] < NEVER))
    rows = {name: a[:, :, :, None] for name, a in asking.items()}
    columns = {name: a[:, :, None] for name, a in read.items()}
    seen = (columns["step"] <= rows["step"]) & (columns["segment"] == rows["segment"]) & there[:, :, None]
    seen &= columns["place"] != rows["place"]
    grouped = blocks(q).reshape(batch, -1, size, shared, heads // shared, q.shape[-1])
    keys, values = blocks(k[:, order]), blocks(v[:, order])
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bmtkgh,bmskh->bmkgts", grouped, keys, preferred_element_type=jnp.float32) * scale
    own = jnp.einsum("bmtkgh,bmtkh->bmkgt", grouped, blocks(k), preferred_element_type=jnp.float32) * scale
    itself = blocks(labels["there"])[:, :, None, None, :, None]
    seen = jnp.concatenate(
        [jnp.broadcast_to(seen[:, :, None, None], logits.shape), jnp.broadcast_to(itself, (*own.shape, 1))], axis=-1
    )
    weights, _ = masked_softmax(jnp.concatenate([logits, own[..., None]], axis=-1), seen)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bmkgts,bmskh->bmtkgh", weights[..., :-1], values)
    out += jnp.einsum("bmkgt,bmtkh->bmtkgh", weights[..., -1], blocks(v))
    return out.reshape(batch, -1, heads, v.shape[-1])[:, :length]
