"""Decays per head or per step in TPU kernels: how sums of log decays come in, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.linear_attention.decay import reading_and_writing
from ar_jax.kernels.linear_attention.pallas_tpu_blocks import places

PARTS = 4  # of the sums: reading and writing, each in two parts that add up


class Sizes(NamedTuple):
    """What a kernel must know beside its arrays.

    Attributes:
      group: heads of a program.
      chunk: tokens.
      dim: channels of a key.
      width: channels of a value.
      strict: tokens read before their own decay and write.
      constant: the decay is the same in every chunk, but for the last one's padding.
    """

    group: int
    chunk: int
    dim: int
    width: int
    strict: bool
    constant: bool


class Decays(NamedTuple):
    """Of one head in one chunk, all float32.

    Attributes:
      between: [C, C], from token j to where token t reads; zero where t does not read j from the memory.
      from_start: [C, E], from the chunk's start to where token t reads, in every column.
      to_end: [C, H], from after token j to the chunk's end, in every column.
      whole: [1, 1], over the chunk.
    """

    between: Array
    from_start: Array
    to_end: Array
    whole: Array


def sums_of(log_decay: Array, sizes: Sizes, pad: int) -> Array:
    """[N] or [B, T, N] -> [B or 1, N / group, K, 4 group, C]: rows of the parts of each head's sums, of K chunks.

    K is 2 where the decay is constant: of any chunk, and of the last one, whose padding does not decay. Few heads get empty
    rows below them, since a register holds eight.
    """
    if sizes.constant:
        decays = jnp.arange(sizes.chunk)[None] < sizes.chunk - jnp.asarray([[0], [pad]])
        rows = jnp.where(decays[None, None], log_decay[None, :, None, None], 0.0)
    else:
        rows = jnp.swapaxes(jnp.pad(log_decay, [(0, 0), (0, pad), (0, 0)]), 1, 2)
        rows = rows.reshape(*rows.shape[:2], -1, sizes.chunk)
    rows = jnp.moveaxis(rows.reshape(rows.shape[0], -1, sizes.group, *rows.shape[2:]), 2, 3)
    reading, writing = reading_and_writing(rows, sizes.strict)
    rows = jnp.concatenate([*reading, *writing], axis=3)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, -rows.shape[3] % 8), (0, 0)])


def sums_spec(sums: Array, sizes: Sizes, chunks: int, place: Callable[[Any], Any]) -> pl.BlockSpec:
    """The sums of a program's heads in the chunk that `place` says is the t-th."""
    batched = sums.shape[0] > 1

    def index(b: Any, n: Any, t: Any) -> tuple[Any, ...]:
        chunk = jnp.where(place(t) == chunks - 1, 1, 0) if sizes.constant else place(t)
        return b if batched else 0, n, chunk, 0, 0

    return pl.BlockSpec((1, 1, 1, *sums.shape[3:]), index)


def cache(sizes: Sizes) -> list[Any]:
    """Scratch for decays that are the same in every chunk."""
    columns = (sizes.chunk, sizes.width, sizes.dim) if sizes.constant else ()
    return [pltpu.VMEM((sizes.group, sizes.chunk, size), jnp.float32) for size in columns]


def decays(sums: Any, cached: Any, sizes: Sizes, last: int) -> Callable[[int], Decays]:
    """A function from heads to their decays in this chunk.

    Constant decays are worked out where they change: in the program's first chunk, and before or after the last one.

    Args:
      sums: the ref of the block of `sums_spec`.
      cached: the refs of `cache`.
      sizes: of the kernel.
      last: the program's step from which on the chunk is another one, the last one or the last but one.
    """

    def of_head(head: int, columns: Array) -> Decays:
        rows = [_row(sums, part, head, sizes) for part in range(PARTS)]
        down = [columns[:, part * sizes.group + head][:, None] for part in range(PARTS)]
        row, column = places((sizes.chunk, sizes.chunk))
        reads = row > column if sizes.strict else row >= column
        # Masked before the exponential: above the diagonal it is positive and could overflow.
        between = jnp.exp(jnp.where(reads, (down[0] - rows[2]) + (down[1] - rows[3]), -jnp.inf))
        from_start = jnp.exp(down[0] + down[1])
        to_end = jnp.exp((rows[2][:, -1:] - down[2]) + (rows[3][:, -1:] - down[3]))
        wide = (jnp.broadcast_to(x, (sizes.chunk, n)) for x, n in ((from_start, sizes.width), (to_end, sizes.dim)))
        return Decays(between, *wide, _whole(sums, head, sizes))

    if not sizes.constant:
        columns = jnp.transpose(sums[0, 0, 0])
        return lambda head: of_head(head, columns)

    @pl.when((pl.program_id(2) == 0) | (pl.program_id(2) == last))
    def _() -> None:
        columns = jnp.transpose(sums[0, 0, 0])
        for head in range(sizes.group):
            for ref, value in zip(cached, of_head(head, columns), strict=False):
                ref[head] = value

    return lambda head: Decays(*(ref[head] for ref in cached), _whole(sums, head, sizes))


def _row(sums: Any, part: int, head: int, sizes: Sizes) -> Array:
    place = part * sizes.group + head
    return sums[0, 0, 0, place : place + 1]


def _whole(sums: Any, head: int, sizes: Sizes) -> Array:
    return jnp.exp(_row(sums, 2, head, sizes)[:, -1:] + _row(sums, 3, head, sizes)[:, -1:])
