"""How the GPU kernels of linear attention cut their arrays, and the decays inside a chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ar_jax.kernels import triton
from ar_jax.kernels.linear_attention.decay import COARSE

SUB_BLOCK = 16  # tokens: inside such a block a decay per channel is taken pair by pair


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Sizes; hashable, as `differentiable` wants its options.

    Attributes:
      batch: B.
      length: T.
      heads: N.
      head_dim: H.
      width: E.
      size: tokens of a chunk.
      tile: columns of the memory that a program works on at once.
      by_channel: whether decays are [B, T, N, H], not [B, N, T].
      strict: whether a query reads before its own token's decay, that is with a bonus.
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    width: int
    size: int
    tile: int
    by_channel: bool
    strict: bool

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return pl.cdiv(self.length, self.size)

    @property
    def keys(self) -> tuple[int, int]:
        """The shape of a head's keys."""
        return self.length, self.head_dim

    @property
    def values(self) -> tuple[int, int]:
        """The shape of a head's values."""
        return self.length, self.width

    @property
    def memory(self) -> tuple[int, int]:
        """The shape of a head's memory."""
        return self.head_dim, self.width

    @property
    def padded(self) -> tuple[int, int, int]:
        """T, H and E of blocks."""
        return self.count * self.size, triton.padded(self.head_dim), triton.padded(self.width)

    def specs(self) -> dict[str, pl.BlockSpec]:
        """What a program of the grid (part, head, example) is given of each array: all of its head."""
        tokens, head_dim, width = self.padded
        head = lambda *shape: pl.BlockSpec((None, None, *shape), lambda _, n, b: (b, n, *[0] * len(shape)))  # noqa: E731
        token = lambda size: pl.BlockSpec((None, tokens, None, size), lambda _, n, b: (b, 0, n, 0))  # noqa: E731
        return {
            "key": token(head_dim),
            "value": token(width),
            "number": head(tokens),
            "decay": token(head_dim) if self.by_channel else head(tokens),
            "memory": head(head_dim, width),
            "memories": pl.BlockSpec((None, self.count, None, head_dim, width), lambda _, n, b: (b, 0, n, 0, 0)),
            "total": pl.BlockSpec((None, self.count, None, head_dim), lambda _, n, b: (b, 0, n, 0)),
            "bonus": pl.BlockSpec((None, head_dim), lambda _, n, b: (n, 0)),
            "scores": head(tokens, self.size),
        }

    def decay(self, ref: Any, rows: Any, columns: Any = slice(None)) -> Decay:
        """Of a part of the tokens, and of the keys' channels."""
        if self.by_channel:
            return Decay.of(triton.load(ref, (rows, columns), self.keys), self.strict)
        return Decay.of(triton.load(ref, (rows,), (self.length,)), self.strict)

    def causal(self) -> Array:
        """Which keys of a chunk are read by which queries, [C, C]."""
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (self.size, self.size), axis) for axis in (0, 1))
        return row > column if self.strict else row >= column

    def last(self, index: Any) -> Any:
        """The place of a chunk's last token; what follows in the last chunk neither writes nor decays."""
        return jnp.minimum(self.size, self.length - index * self.size) - 1

    def compiler_params(self, warps: int, stages: int) -> plgpu.CompilerParams:
        """For `pallas_call`."""
        return plgpu.CompilerParams(num_warps=warps, num_stages=stages)


@dataclasses.dataclass(frozen=True)
class Decay:
    """Sums of log decays over the tokens of a block, [C] or [C, H], each in two parts as in `running_sums`.

    Attributes:
      reading: from the block's start to where each token reads.
      writing: from the block's start to after each token.
      total: over the block, [] or [H].
    """

    reading: tuple[Array, Array]
    writing: tuple[Array, Array]
    total: tuple[Array, Array]

    @classmethod
    def of(cls, log_decay: Array, strict: bool) -> Decay:
        """From the log decay of each token."""
        coarse = jnp.floor(log_decay * COARSE + 0.5) * (1 / COARSE)
        parts = coarse, log_decay - coarse
        writing = jnp.cumsum(parts[0], axis=0), jnp.cumsum(parts[1], axis=0)
        reading = (writing[0] - parts[0], writing[1] - parts[1]) if strict else writing
        return cls(reading, writing, (parts[0].sum(axis=0), parts[1].sum(axis=0)))

    def from_start(self) -> Array:
        """What is left of the memory before the block where each token reads it, [C, 1] or [C, H]."""
        return _columns(jnp.exp(self.reading[0] + self.reading[1]))

    def to_end(self) -> Array:
        """What is left of what each token writes after the block, [C, 1] or [C, H]."""
        total = [t if t.ndim == 0 else t[None] for t in self.total]
        return _columns(jnp.exp((total[0] - self.writing[0]) + (total[1] - self.writing[1])))

    def whole(self) -> Array:
        """What is left of the memory after the block, [] or [H, 1]."""
        whole = jnp.exp(self.total[0] + self.total[1])
        return whole if whole.ndim == 0 else whole[:, None]

    def between(self, causal: Array) -> Array:
        """What is left of each token's writing where each token reads, [C, C]; of decays per token only."""
        exponent = sum(r[:, None] - w[None, :] for r, w in zip(self.reading, self.writing, strict=True))
        # Masked before the exponential: above the diagonal it is positive and could overflow.
        return jnp.exp(jnp.where(causal, exponent, -jnp.inf))


def _columns(x: Array) -> Array:
    return x[:, None] if x.ndim == 1 else x
