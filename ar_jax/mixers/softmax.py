"""Softmax attention on the step rule, with a growing cache or, with a window, a ring buffer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.step_attention import ROUTES, merge, step_attention
from ar_jax.kernels.step_attention.key_bias import forgotten, key_biased
from ar_jax.mixers.norms import make_norm
from ar_jax.mixers.positions import RelativeBias, rotate
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads, split_heads

QK_NORMS = ("none", "rms", "layer", "l2")
PREFIX_ROTATIONS = ("identity", "zero")
ROPE_PLACES = ("grid", "line_behind")


@struct.dataclass
class Cache:
    """Keys, values, steps and positions of the remembered tokens, in the order they came; a ring once it is full.

    Attributes:
      k: [B, K, S, H], heads first: so attention reads it as it lies.
      v: [B, K, S, H].
      step: [B, S] int32.
      position: [B, S, D] int32, or D = 0 where neither a bias nor a distance needs it.
      forgotten: [B, N, S] float32, the cumulated logarithms of the forget gates, or N = 0 without them.
      count: int32 scalar, how many tokens have come.
    """

    k: Array
    v: Array
    step: Array
    position: Array
    forgotten: Array
    count: Array

    def append(self, new: Cache, at: Array | None = None) -> Cache:
        """Writes new tokens behind the last, over the oldest ones where the end is reached; or at places [n], if below the end."""
        size, length = self.k.shape[2], new.k.shape[2]
        skipped = max(length - size, 0) if at is None else 0
        place = (self.count + skipped + jnp.arange(length - skipped)) % size if at is None else at

        def write(name: str) -> Array:
            old, came, axis = getattr(self, name), getattr(new, name), _TIME[name]
            came = jnp.broadcast_to(came, (old.shape[0], *came.shape[1:])).astype(old.dtype)
            came = jax.lax.slice_in_dim(came, skipped, length, axis=axis)
            if length - skipped == 1:  # one piece: the array is updated where it is
                return jax.lax.dynamic_update_slice_in_dim(old, came, place[0], axis)
            where = (slice(None),) * axis + (place,)
            return old.at[where].set(came, unique_indices=at is None, mode=None if at is None else "drop")

        return Cache(**{name: write(name) for name in _TIME}, count=self.count + length)

    def first(self, count: int) -> Cache:
        """The first so many places."""
        return self.between(0, count)

    def between(self, start: int, stop: int | None = None) -> Cache:
        """The places from one to another, or to the end."""

        def cut(name: str) -> Array:
            array, axis = getattr(self, name), _TIME[name]
            size = array.shape[axis]
            return jax.lax.slice_in_dim(array, start, size if stop is None else min(stop, size), axis=axis)

        return Cache(**{name: cut(name) for name in _TIME}, count=self.count)


_TIME = {"k": 2, "v": 2, "step": 1, "position": 1, "forgotten": 2}  # the axis of time of each array


class Softmax(nn.Module):
    """Multi-head attention (arXiv:1706.03762), grouped (GQA) or multi-query (MQA) if num_kv_heads is smaller.

    Attributes:
      num_kv_heads: key and value heads, a divisor of num_heads; None takes num_heads.
      head_dim: embed_dim / num_heads if None.
      rope_base: base of the rotary embedding over all axes of the position; 0 turns nothing.
      rope_channels: only the first so many channels of a head are turned (GPT-NeoX, arXiv:2204.06745); None turns all.
      rope_heads: only the first so many heads are turned; None turns all.
      rope_places: what is turned by: "grid", the position, or "line_behind", the place in a line of all slots and the prefix
        behind them, whose first places, as many as the prefix has, count as none (MaskGIL's code, arXiv:2507.13032, which has
        the prefix behind the slots, but its row of the table in front).
      prefix_rotation: what becomes of tokens without a place: "identity" leaves them, "zero" makes their queries and keys
        zero vectors, as LlamaGen's table does (arXiv:2406.06525): they read evenly, and enter every softmax with logit 0.
      qk_norm: how queries and keys are normalised per head (arXiv:2302.05442): "none", "rms", "layer", or "l2": to unit
        length, the logits times a learned factor of at most 100 (VAR, arXiv:2404.02905).
      norm_epsilon: of these norms.
      logit_scale: factor of the logits; None takes 1 / sqrt(head_dim).
      qkv_bias: queries, keys and values have a bias; key_bias = False leaves it out of the keys.
      out_bias: the last projection has one.
      bias_distance: reach of a learned relative bias per axis; 0 has none.
      window: only the last so many steps are read, and the state is a ring buffer; 0 reads all.
      forget_gate: every token lets the logits of what was before it fall by -log sigmoid(w x + b), for each head
        (Forgetting Transformer, arXiv:2503.02130): s_ij = q_i . k_j / sqrt(H) + sum of log gates of j + 1 ... i.
      query_peers: queries of one step read one another, too, so that what they ask for together fits (LPD,
        arXiv:2507.01957, sec. 3.2); they still leave no trace, and nobody else reads them.
      across: how devices among which the mesh cuts a sequence that is fed whole read one another, see `step_attention`;
        whoever reads a cache takes that operation's own choice, as None does.
    """

    embed_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10000.0
    rope_channels: int | None = None
    rope_heads: int | None = None
    rope_places: str = "grid"
    prefix_rotation: str = "identity"
    qk_norm: str = "none"
    norm_epsilon: float = 1e-6
    logit_scale: float | None = None
    qkv_bias: bool = False
    key_bias: bool = True
    out_bias: bool = False
    bias_distance: int = 0
    window: int = 0
    forget_gate: bool = False
    query_peers: bool = False
    position_axes: int = 0
    num_rows: int = 0
    num_prefix: int = 0
    reads_near: bool = False
    implementation: str | None = None
    across: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int, int]:
        """Query heads, key heads and the width of a head."""
        if self.num_heads < 1 or (self.head_dim is None and self.embed_dim % self.num_heads):
            divisors = [d for d in range(1, self.embed_dim + 1) if self.embed_dim % d == 0]
            raise UsageError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; use one of {divisors}, or set head_dim."
            )
        shared = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if shared < 1 or self.num_heads % shared:
            raise UsageError(f"num_kv_heads={shared} does not divide num_heads={self.num_heads}.")
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        turned = self.rope_channels
        if turned is not None and (turned % 2 or not 0 < turned <= head_dim):
            raise UsageError(
                f"rope_channels={turned} must be even, at least 2 and at most head_dim={head_dim}; set another, or rope_base=0."
            )
        if self.rope_heads is not None and (shared != self.num_heads or not 0 <= self.rope_heads <= shared):
            raise UsageError(
                f"rope_heads={self.rope_heads} must be at most num_heads={self.num_heads}, each with keys of its own; "
                "leave num_kv_heads out."
            )
        if self.rope_base and turned is None and head_dim % 2:
            raise UsageError(
                f"the rotary embedding turns pairs, but head_dim={head_dim} is odd; set rope_base=0 or an even head_dim."
            )
        return self.num_heads, shared, head_dim

    def setup(self) -> None:
        """Projections as matrices: [D, heads H] and back."""
        heads, shared, head_dim = self.dims
        tables = (("qk_norm", QK_NORMS), ("prefix_rotation", PREFIX_ROTATIONS), ("rope_places", ROPE_PLACES))
        for name, known in tables:
            choose(dict.fromkeys(known), getattr(self, name), f"model.mixer.{name}")
        if self.across is not None:
            choose(ROUTES, self.across, "model.mixer.across")
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query = dense(heads * head_dim, use_bias=self.qkv_bias)
        self.key = dense(shared * head_dim, use_bias=self.qkv_bias and self.key_bias)
        self.value = dense(shared * head_dim, use_bias=self.qkv_bias)
        self.out = dense(self.embed_dim, use_bias=self.out_bias)
        if self.qk_norm in ("rms", "layer"):
            norm = make_norm(self.qk_norm, self.norm_epsilon, self.dtype, self.param_dtype)
            self.query_norm, self.key_norm = norm(), norm()
        if self.qk_norm == "l2":
            start = nn.initializers.constant(math.log(4))
            self.log_scale = self.param("log_scale", start, (heads,), self.param_dtype)
        if self.bias_distance:
            self.bias = RelativeBias(heads, self.bias_distance, self.param_dtype)
        if self.forget_gate and self.bias_distance:
            raise UsageError("config.model.mixer.forget_gate and bias_distance are two biases; set one of them to 0.")
        if self.forget_gate and self.query_peers:
            raise UsageError("config.model.mixer.query_peers needs forget_gate=False: queries have no gates.")
        if self.reads_near and (
            self.bias_distance or self.forget_gate or self.window or self.query_peers or self.across
        ):
            raise UsageError(
                "feed 'nearby' goes with plain softmax attention; leave bias_distance, forget_gate, window, query_peers "
                "and across of config.model.mixer out."
            )
        if self.forget_gate:
            self.forget = nn.Dense(heads, dtype=jnp.float32, param_dtype=self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Cache:
        """A cache for max_len tokens or, with a window, for as many as its steps can hold."""
        _, shared, head_dim = self.dims
        size = max(min(max_len, self.window * max_step_len) if self.window else max_len, 1)
        size = 1 if self.window == 1 else size  # nothing is read again: a piece holds whole steps
        entries = jnp.zeros((batch_size, shared, size, head_dim), self.dtype)
        axes = self.position_axes if self.bias_distance or self.reads_near else 0
        position = jnp.zeros((batch_size, size, axes), jnp.int32)
        # Two arrays, not one twice: a sampler donates its state, and a buffer can be donated only once.
        step, count = jnp.full((batch_size, size), NEVER), jnp.zeros((), jnp.int32)
        forgotten = jnp.zeros((batch_size, self.num_heads * self.forget_gate, size), jnp.float32)
        return Cache(entries, jnp.zeros_like(entries), step, position, forgotten, count)

    def __call__(self, x: Array, tokens: Tokens, state: Cache | None = None) -> tuple[Array, Cache | None]:
        """See Mixer."""
        if state is not None and tokens.segment is not None:
            raise ValueError("packed segments are fed whole, without a state")
        new = self.entries(x, tokens)
        if state is not None and self.forget_gate:  # sums go on from the last one, which is the least
            new = dataclasses.replace(new, forgotten=new.forgotten + state.forgotten.min(axis=2, keepdims=True))
        if tokens.near is not None:
            return self._near(x, tokens, new, state)
        across = self.across if state is None else None
        if state is None or self.window == 1:
            readable = new
        elif self.window:  # the ring still needs what this piece would overwrite
            readable, state = joined(state, new), state.append(new)
        else:
            readable = state = state.append(new)
        return self.attend(x, tokens, readable, across), state

    def entries(self, x: Array, tokens: Tokens) -> Cache:
        """What the remembered tokens of x [B, T, D] leave in a cache."""
        n = tokens.num_remembered
        x, step, position = x[:, :n], tokens.step[:, :n], tokens.position[:, :n]
        k = self._normed(split_heads(self.key(x), self.dims[1]), "key")
        if self.rope_base:
            k = self._turned(k, self._places(tokens)[:, :n])
        return Cache(
            jnp.swapaxes(k, 1, 2),
            jnp.swapaxes(split_heads(self.value(x), self.dims[1]), 1, 2),
            step,
            position if self.bias_distance or self.reads_near else position[..., :0],
            self._forgotten(x, tokens) if self.forget_gate else jnp.zeros((len(x), 0, n), jnp.float32),
            jnp.zeros((), jnp.int32),
        )

    def _forgotten(self, x: Array, tokens: Tokens) -> Array:
        """Cumulated log gates of the remembered tokens, x [B, n, D], in time order, [B, N, n]."""
        n = x.shape[1]
        log_forget = jax.nn.log_sigmoid(self.forget(x).astype(jnp.float32))
        step = tokens.step[:, :n]
        if tokens.padded:
            log_forget = jnp.where((step < NEVER)[..., None], log_forget, 0)
        return forgotten(log_forget, step, *([] if tokens.segment is None else [tokens.segment[:, :n]]))

    def queries(self, x: Array, tokens: Tokens) -> Array:
        """The queries of tokens x [B, T, D], normalised and turned, [B, T, N, H]."""
        return self._facing(self._normed(split_heads(self.query(x), self.num_heads), "query"), tokens)

    def _facing(self, q: Array, tokens: Tokens) -> Array:
        """Queries [B, T, N, H], turned by where they are."""
        return self._turned(q, self._places(tokens)) if self.rope_base else q

    def attend(self, x: Array, tokens: Tokens, readable: Cache, across: str | None = None) -> Array:
        """What tokens x [B, T, D] read in a cache, [B, T, D]; across: see `step_attention`."""
        if not self.window and tokens.num_readable is not None:  # reading what is still empty takes as long
            readable = readable.first(tokens.num_readable)
        q = self.queries(x, tokens)
        bias = self.bias(tokens.position, readable.position) if self.bias_distance else None
        peers = self.query_peers and tokens.num_remembered < x.shape[1]
        attend = functools.partial(step_attention, bias=bias, return_lse=peers)
        if self.forget_gate:
            fallen = readable.forgotten.min(axis=2, keepdims=True) - readable.forgotten
            attend = functools.partial(key_biased, step_attention, key_bias=fallen)
        out = attend(
            q,
            jnp.swapaxes(readable.k, 1, 2),
            jnp.swapaxes(readable.v, 1, 2),
            tokens.step,
            readable.step,
            window=self.window or None,
            query_segment=tokens.segment,
            key_segment=None if tokens.segment is None else tokens.segment[:, : tokens.num_remembered],
            scale=self._scale,
            across=across,
            implementation=self.implementation,
        )
        if peers:
            out = self._with_peers(x, q, tokens, *out)
        return self.out(merge_heads(out))

    def _near(self, x: Array, tokens: Tokens, new: Cache, state: Cache | None) -> tuple[Array, Cache | None]:
        """What tokens x [B, T, D] read of the prefix and of what is near, [B, T, D], and the state after them.

        The prefix stays in the first places of the state, and is read without being turned to: it has no place, so where one
        reads it from must not matter. A piece of several tokens reads what it writes over, too.
        """
        assert tokens.near is not None
        first, after = self.num_prefix, None
        prefix, rest = new.first(first), new.between(first)
        if state is not None:
            after = state.append(new, None if tokens.at is None else tokens.at[0])
            prefix, rest = after.first(first), after.between(first, tokens.num_readable)
            if tokens.at is not None and new.k.shape[2] > 1:
                rest = joined(state.between(first), new)
        q, (sides, reach) = self._normed(split_heads(self.query(x), self.num_heads), "query"), tokens.near

        def patch(position: Array) -> Array:
            return position[..., : len(sides)] // jnp.asarray(sides, jnp.int32)[None, None]

        placed = jnp.where((rest.position < 0).any(axis=-1), NEVER, rest.step)
        distance = dict(query_position=patch(tokens.position), key_position=patch(rest.position))
        parts: list[tuple[Array, Cache, Array, Mapping[str, Any]]] = [(q, prefix, prefix.step, {})]
        if rest.k.shape[2]:
            parts += [(self._facing(q, tokens), rest, placed, distance | dict(reach=tuple((n, n) for n in reach)))]
        outs, lses = zip(
            *(
                step_attention(
                    query,
                    jnp.swapaxes(cache.k, 1, 2),
                    jnp.swapaxes(cache.v, 1, 2),
                    tokens.step,
                    step,
                    **bounds,
                    scale=self._scale,
                    return_lse=True,
                    implementation=self.implementation,
                )
                for query, cache, step, bounds in parts
            ),
            strict=True,
        )
        return self.out(merge_heads(merge(jnp.stack(outs), jnp.stack(lses))[0])), after

    def _with_peers(self, x: Array, q: Array, tokens: Tokens, out: Array, lse: Array) -> Array:
        """What was read [B, T, N, H], and in the queries also what those of the same step give one another."""
        n = tokens.num_remembered
        asking = tokens.part(slice(n, None))
        own = self.entries(x[:, n:], dataclasses.replace(asking, num_remembered=x.shape[1] - n))
        told, told_lse = step_attention(
            q[:, n:],
            jnp.swapaxes(own.k, 1, 2),
            jnp.swapaxes(own.v, 1, 2),
            asking.step,
            asking.step,
            window=1,
            query_segment=asking.segment,
            key_segment=asking.segment,
            bias=self.bias(asking.position, asking.position) if self.bias_distance else None,
            scale=self._scale,
            return_lse=True,
            implementation=self.implementation,
        )
        both, _ = merge(jnp.stack([out[:, n:], told]), jnp.stack([lse[:, n:], told_lse]))
        return jnp.concatenate([out[:, :n], both], axis=1)

    @property
    def _scale(self) -> float | None:
        return 1.0 if self.qk_norm == "l2" else self.logit_scale

    def _places(self, tokens: Tokens) -> Array:
        """What the rotary embedding turns by, [B or 1, T, axes]; -1 for no place."""
        if self.rope_places == "grid":
            return tokens.position
        line = (jnp.asarray(tokens.row) - self.num_prefix) % self.num_rows
        return jnp.maximum(line - self.num_prefix, -1)[..., None]

    def _turned(self, x: Array, position: Array) -> Array:
        """Queries or keys [B, T, heads, H], the channels and heads of the rotary embedding turned."""
        heads = x.shape[2] if self.rope_heads is None else self.rope_heads
        channels = self.rope_channels or x.shape[3]
        part = rotate(x[:, :, :heads, :channels], position, self.rope_base, self.prefix_rotation == "zero")
        if part.shape == x.shape:
            return part
        # Put together: if they are written into x, XLA on CPUs may write over channels that it has still to read.
        part = jnp.concatenate([part, x[:, :, :heads, channels:]], axis=3)
        return jnp.concatenate([part, x[:, :, heads:]], axis=2)

    def _normed(self, x: Array, kind: str) -> Array:
        """Queries or keys [B, T, heads, H], normalised."""
        if self.qk_norm == "none":
            return x
        if self.qk_norm != "l2":
            return self.query_norm(x) if kind == "query" else self.key_norm(x)
        x = x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))
        if kind == "key":
            return x
        scale = jnp.exp(jnp.minimum(self.log_scale, math.log(100)))
        return x * scale[None, None, :, None].astype(x.dtype)


def joined(old: Cache, new: Cache) -> Cache:
    """Both caches' tokens, one after the other."""

    def join(name: str) -> Array:
        before, came = getattr(old, name), getattr(new, name)
        came = jnp.broadcast_to(came, (before.shape[0], *came.shape[1:])).astype(before.dtype)
        return jnp.concatenate([before, came], axis=_TIME[name])

    return Cache(**{name: join(name) for name in _TIME}, count=old.count)
