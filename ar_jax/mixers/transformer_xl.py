"""Transformer-XL (arXiv:1901.02860): attention to a segment and to what is remembered of those before, by distance."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.step_attention import merge, step_attention
from ar_jax.mixers.protocol import Tokens, merge_heads, split_heads
from ar_jax.mixers.softmax import Cache, Softmax, joined


class TransformerXL(nn.Module):
    """o_i = sum_j softmax_j(((q_i + u) . k_j + (q_i + v) . W_r r_{i - j}) / sqrt(H)) v_j  (arXiv:1901.02860, sec. 3.3).

    u and v are learned, r sinusoids of the distance. Segments are segment_length steps; token i reads those j <= i of its own
    segment, and the last memory_length steps before it. What is remembered has no gradient: that of one long sequence is the
    sum of the segments', each given the memory that the segment before left (sec. 3.2). Without memory this is attention
    in blocks.

    Distances are those of steps. The state is a ring of segment_length + memory_length steps.
    Cost: a whole sequence of T tokens is read at once: O(T^2) logits; a single token O(segment_length + memory_length).

    Attributes:
      segment_length: steps of a segment.
      memory_length: steps before it that are read.
      head_dim: embed_dim / num_heads if None.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    segment_length: int = 64
    memory_length: int = 64
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def _softmax(self, **more: Any) -> Softmax:
        names = ("embed_dim", "num_heads", "head_dim", "dtype", "param_dtype")
        fields = {name: getattr(self, name) for name in names}
        return Softmax(**fields, window=self.segment_length + self.memory_length, rope_base=0.0, **more)

    def setup(self) -> None:
        """Softmax attention's projections; that of distances, [D, D]; u and v, [N, H]."""
        if self.segment_length < 1 or self.memory_length < 0:
            raise UsageError(
                f"config.model.mixer: segment_length={self.segment_length} must be at least 1, and "
                f"memory_length={self.memory_length} at least 0."
            )
        self.softmax = self._softmax()
        heads, _, head_dim = self.softmax.dims
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.distance = Dense(heads * head_dim, use_bias=False, **types)
        start = nn.initializers.normal(0.02)
        self.content_bias, self.distance_bias = (
            self.param(f"{name}_bias", start, (heads, head_dim), self.param_dtype) for name in ("content", "distance")
        )

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Cache:
        """A cache of as many tokens as a segment and its memory can hold."""
        return self._softmax(parent=None).init_state(batch_size, max_len, max_step_len)

    def __call__(self, x: Array, tokens: Tokens, state: Cache | None = None) -> tuple[Array, Cache | None]:
        """See Mixer."""
        if state is not None and tokens.segment is not None:
            raise ValueError("packed segments are fed whole, without a state")
        new = self.softmax.entries(x, tokens)
        if state is not None:  # the ring still needs what this piece would overwrite
            out, _ = self._attend(x, tokens, joined(state, new), -self.memory_length, self.segment_length)
            return self.softmax.out(merge_heads(out)), state.append(new)
        own = self._attend(x, tokens, new, 0, self.segment_length)
        if not self.memory_length:
            return self.softmax.out(merge_heads(own[0])), None
        remembered = self.softmax.entries(jax.lax.stop_gradient(x), tokens)
        before = self._attend(x, tokens, remembered, -self.memory_length, 0)
        outs, lses = zip(own, before, strict=True)
        return self.softmax.out(merge_heads(merge(jnp.stack(outs), jnp.stack(lses))[0])), None

    def _attend(self, x: Array, tokens: Tokens, readable: Cache, start: int, stop: int) -> tuple[Array, Array]:
        """What tokens read between two steps, counted from their segments' first: [B, T, N, H] and its log-sum-exp."""
        q = split_heads(self.softmax.query(x), self.num_heads)
        scale = q.shape[-1] ** -0.5
        first = tokens.step // self.segment_length * self.segment_length
        content, distance = (
            q + bias.astype(self.dtype)[None, None] for bias in (self.content_bias, self.distance_bias)
        )
        return step_attention(
            content,
            jnp.swapaxes(readable.k, 1, 2),
            jnp.swapaxes(readable.v, 1, 2),
            tokens.step,
            readable.step,
            query_segment=tokens.segment,
            key_segment=None if tokens.segment is None else tokens.segment[:, : tokens.num_remembered],
            query_position=(first + start)[..., None],
            key_position=readable.step[..., None],
            reach=((0, stop - start - 1),),
            bias=self._of_distances(distance, tokens.step, readable.step) * scale,
            scale=scale,
            return_lse=True,
            implementation=self.implementation,
        )

    def _of_distances(self, q: Array, query_step: Array, key_step: Array) -> Array:
        """q_i . W_r r_{i - j} of queries [B, T, N, H], [B, N, T, S] float32."""
        count = self.segment_length + self.memory_length
        speed = 10000.0 ** (-jnp.arange(0, self.embed_dim, 2, dtype=jnp.float32) / self.embed_dim)
        angle = jnp.arange(count, dtype=jnp.float32)[:, None] * speed[None]
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)[:, : self.embed_dim].astype(self.dtype)
        rows = self.distance(waves[None]).reshape(count, *q.shape[2:])
        each = jnp.einsum("btnh,rnh->bntr", q, rows, preferred_element_type=jnp.float32)
        index = jnp.clip(query_step[:, :, None] - key_step[:, None], 0, count - 1)[:, None]
        return jnp.take_along_axis(each, jnp.broadcast_to(index, (len(q), *index.shape[1:])), axis=3)
