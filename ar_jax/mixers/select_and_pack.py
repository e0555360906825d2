"""Select and pack attention (SPA, arXiv:2410.23608): a gate chooses tokens, those of some examples share a row."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.step_attention import step_attention
from ar_jax.mixers.common.side_loss import with_side_loss
from ar_jax.mixers.common.statistics import Statistics
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads, split_heads, take


@struct.dataclass
class Pack:
    """Chosen tokens of a batch, one behind the other.

    Attributes:
      index: [P] int32, where each stands among B T tokens; B T behind the last one.
      owner: [P] int32, which tokens read one another: those of one example and segment; -1 behind the last one.
      left_out: int32 scalar, how many were chosen for which there was no room: the last ones.
    """

    index: Array
    owner: Array
    left_out: Array


def pack(chosen: Array, owner: Array, capacity: int) -> Pack:
    """Packs the chosen tokens, in their order, into a row of static length.

    Args:
      chosen: [B, T] bool.
      owner: [B, T] int32 >= 0, the same for tokens that read one another.
      capacity: P.
    """
    flat, size = chosen.reshape(-1), chosen.size
    count = flat.sum(dtype=jnp.int32)
    index = jnp.argsort(~flat, stable=True)[:capacity]
    filled = jnp.arange(capacity) < count
    return Pack(
        jnp.where(filled, index, size),
        jnp.where(filled, owner.reshape(-1)[index], -1),
        jnp.maximum(count - capacity, 0),
    )


class SelectAndPack(nn.Module):
    """y_i = sigmoid(g_i) attention(chosen tokens of the example)_i where g_i = w x_i + b > 0, and 0 elsewhere.

    The chosen tokens of some examples stand in one row, and blocks of it that belong to different examples are skipped: what
    is computed follows the number of chosen tokens, whatever their share in each example, under static shapes. What finds
    no room is counted, never silently lost: `statistics/left_out` is the share of chosen tokens that had none in the last
    step of training; with capacity 1 all have. Selection labels supervise the gate where there are any: `Tokens.features`
    [B, T, 1], 1 for a token to choose; see `selection_loss`.

    Attributes:
      group: examples that share a row; a batch has as many rows as it needs.
      capacity: the row's length as a part of these examples' tokens.
      rate: the part of the tokens that should be chosen where there are no labels; a loss of the mixer's own sees to it.
      rate_weight: of that loss, or of the selection loss where there are labels; 0 does without.
    """

    embed_dim: int
    num_heads: int = 4
    group: int = 4
    capacity: float = 1.0
    rate: float = 0.5
    rate_weight: float = 0.1
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    def setup(self) -> None:
        """The gate, and projections."""
        if self.group < 1 or not 0 < self.capacity <= 1 or not 0 < self.rate < 1 or self.rate_weight < 0:
            raise UsageError(
                f"config.model.mixer: group={self.group} must be at least 1, capacity={self.capacity} must lie in (0, 1], "
                f"rate={self.rate} in (0, 1), and rate_weight={self.rate_weight} be at least 0."
            )
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(
                f"config.model.mixer.num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}."
            )
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value, self.out = (dense(self.embed_dim) for _ in range(4))
        self.select = nn.Dense(1, dtype=jnp.float32, param_dtype=self.param_dtype, bias_init=nn.initializers.ones)
        self.statistics = Statistics((), nn.initializers.zeros, "left_out")

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> tuple[()]:
        """Nothing is remembered: everything is read at once."""
        return ()

    def logits(self, x: Array) -> Array:
        """The gate of tokens x [B, T, D], [B, T] float32: chosen where it is above 0."""
        return self.select(x.astype(jnp.float32))[..., 0]

    def __call__(self, x: Array, tokens: Tokens, state: tuple[()] | None = None) -> tuple[Array, tuple[()] | None]:
        """See Mixer."""
        batch, length, width = x.shape
        gate = self.logits(x)
        present = jnp.broadcast_to(tokens.step < NEVER, gate.shape)
        owner = jnp.broadcast_to(length * jnp.arange(batch, dtype=jnp.int32)[:, None], gate.shape)
        if tokens.segment is not None:
            owner = owner + tokens.segment
        chosen = present & (gate > 0)
        group = min(self.group, batch)
        capacity = math.ceil(self.capacity * group * length)

        def in_rows(a: Array) -> Array:
            """[B, T, ...] to [B / group, group T, ...]; examples that fill up the last row have nothing chosen."""
            a = jnp.pad(a, ((0, -batch % group), (0, 0)) + ((0, 0),) * (a.ndim - 2))
            return a.reshape(-1, group * length, *a.shape[2:])

        packed = jax.vmap(lambda chosen, owner: pack(chosen, owner, capacity))(in_rows(chosen), in_rows(owner))
        fed = take(in_rows(x), jnp.minimum(packed.index, group * length - 1))
        read = self._attend(fed, packed.owner).astype(self.dtype)
        empty = jnp.zeros((len(read), group * length, width), self.dtype)
        put = jax.vmap(lambda empty, index, row: empty.at[index].set(row, mode="drop"))
        read = put(empty, packed.index, read).reshape(-1, length, width)[:batch]
        out = self.out(read * nn.sigmoid(gate)[..., None].astype(self.dtype))
        left_out = packed.left_out.sum() / jnp.maximum(chosen.sum(), 1)
        out = self.statistics.moves(left_out - self.statistics(), out)
        if self.rate_weight:
            if tokens.features is None:
                share = jnp.where(present, nn.sigmoid(gate), 0).sum() / jnp.maximum(present.sum(), 1)
                loss = jnp.square(share - self.rate)
            else:
                loss = selection_loss(gate, tokens.features[..., 0] > 0)
            out = with_side_loss(out, self.rate_weight * loss)
        return out, state

    def _attend(self, x: Array, owner: Array) -> Array:
        """Attention in rows of tokens [R, P, D] among those of one owner."""
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        zeros = jnp.zeros(x.shape[1], jnp.int32)
        segments: dict[str, Any] = {"query_segment": owner, "key_segment": owner}
        return merge_heads(step_attention(q, k, v, zeros, zeros, **segments, implementation=self.implementation))


def selection_labels(boxes: Array, grid: tuple[int, int]) -> Array:
    """Which places of a grid lie in any of an image's boxes, [B, H W] bool.

    Args:
      boxes: [B, M, 4], top, left, bottom and right as parts of the image; an empty box marks nothing.
      grid: H and W.
    """
    down, right = ((jnp.arange(n) + 0.5) / n for n in grid)

    def within(centres: Array, low: Array, high: Array) -> Array:
        return (centres[None, None] >= low[..., None]) & (centres[None, None] < high[..., None])

    rows, columns = within(down, boxes[..., 0], boxes[..., 2]), within(right, boxes[..., 1], boxes[..., 3])
    return (rows[..., :, None] & columns[..., None, :]).any(axis=1).reshape(len(boxes), -1)


def selection_loss(logits: Array, labels: Array) -> Array:
    """The mean cross-entropy of gates [B, T] and selection labels [B, T] bool, [] float32."""
    return (jax.nn.softplus(logits) - jnp.where(labels, logits, 0)).mean()
