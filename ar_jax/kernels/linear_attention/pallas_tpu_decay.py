"""Decays per head or per step in TPU kernels: what comes in, and what is made of it.

Sums of log decays come in as rows of tokens. Where the decay is the same in every chunk, what else is made of them comes in,
too, and stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

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
      to_end: [C, E], from after token j to the chunk's end, in every column.
      whole: [1, 1], over the chunk.
    """

    between: Array
    from_start: Array
    to_end: Array
    whole: Array


def sums_and_decays(log_decay: Array, sizes: Sizes, pad: int) -> tuple[Array, ...]:
    """[N] or [B, T, N] to what a kernel reads of K chunks.

    K is 2 where the decay is constant: of any chunk, and of the last one, whose padding does not decay.

    Returns:
      [B or 1, N / group, K, R, C], rows of the parts of each head's sums, and empty ones below them if they are few, since a
      register holds eight. If constant between, from_start and to_end of Decays, too, [N, K, C, C or E].
    """
    if sizes.constant:
        decays = jnp.arange(sizes.chunk)[None] < sizes.chunk - jnp.asarray([[0], [pad]])
        sums = jnp.where(decays[None, None], log_decay[None, :, None, None], 0.0)
    else:
        sums = jnp.swapaxes(jnp.pad(log_decay, [(0, 0), (0, pad), (0, 0)]), 1, 2)
        sums = sums.reshape(*sums.shape[:2], -1, sizes.chunk)
    reading, writing = reading_and_writing(sums, sizes.strict)  # [B or 1, N, K, C]
    rows = jnp.stack([*reading, *writing])
    rows = rows.reshape(PARTS, rows.shape[1], -1, sizes.group, *rows.shape[3:])
    rows = jnp.transpose(rows, (1, 2, 4, 0, 3, 5)).reshape(rows.shape[1], rows.shape[2], rows.shape[4], -1, sizes.chunk)
    rows = jnp.pad(rows, [(0, 0)] * 3 + [(0, -rows.shape[3] % 8), (0, 0)])
    if not sizes.constant:
        return (rows,)
    parts = jax.lax.stop_gradient(jnp.stack([*reading, *writing]))[:, 0, ..., None, :]  # [4, N, K, 1, C]
    of_chunk = functools.partial(_decays, sizes=sizes)
    each = jax.vmap(jax.vmap(of_chunk, in_axes=(1, 1)), in_axes=(1, 1))(parts, jnp.swapaxes(parts, 3, 4))
    return rows, *each[:3]


def _decays(rows: Any, columns: Any, sizes: Sizes) -> Decays:
    """From the parts of the sums of one head in one chunk, as rows [1, C] and as columns [C, 1]."""
    row, column = places((sizes.chunk, sizes.chunk))
    reads = row > column if sizes.strict else row >= column
    difference = lambda x, y: (x[0] - y[0]) + (x[1] - y[1])  # noqa: E731
    wide = [jnp.broadcast_to(x, (sizes.chunk, sizes.width)) for x in columns]
    ends = [row[:, -1:] for row in rows[2:]]
    return Decays(
        # Masked before the exponential: above the diagonal it is positive and could overflow.
        between=jnp.exp(jnp.where(reads, difference(columns[:2], rows[2:]), -jnp.inf)),
        from_start=jnp.exp(wide[0] + wide[1]),
        to_end=jnp.exp(difference([jnp.broadcast_to(x, wide[0].shape) for x in ends], wide[2:])),
        whole=jnp.exp(ends[0] + ends[1]),
    )


def specs(decay: tuple[Array, ...], sizes: Sizes, chunks: int, place: Callable[[Any], Any]) -> list[pl.BlockSpec]:
    """Of the arrays of `sums_and_decays`: a program's heads in the chunk that `place` says is the t-th."""
    batched = decay[0].shape[0] > 1
    chunk = (lambda t: jnp.where(place(t) == chunks - 1, 1, 0)) if sizes.constant else place
    sums = pl.BlockSpec((1, 1, 1, *decay[0].shape[3:]), lambda b, n, t: (b if batched else 0, n, chunk(t), 0, 0))
    shapes = [(sizes.group, 1, *x.shape[2:]) for x in decay[1:]]
    return [sums, *(pl.BlockSpec(shape, lambda b, n, t: (n, chunk(t), 0, 0)) for shape in shapes)]


def decays(refs: Sequence[Any], sizes: Sizes) -> list[Decays]:
    """Those of each of a program's heads, from the blocks of `specs`."""
    sums = refs[0][0, 0, 0]
    places = [[part * sizes.group + head for part in range(PARTS)] for head in range(sizes.group)]
    rows = [[sums[n : n + 1] for n in of_head] for of_head in places]
    if sizes.constant:
        whole = [jnp.exp(row[2][:, -1:] + row[3][:, -1:]) for row in rows]
        between, from_start, to_end = refs[1:]
        return [Decays(between[n, 0], from_start[n, 0], to_end[n, 0], whole[n]) for n in range(sizes.group)]
    down = jnp.transpose(sums)
    columns = [[down[:, n : n + 1] for n in of_head] for of_head in places]
    if not sizes.strict:  # tokens read where they write: the same columns need not be spread over the lanes twice
        columns = [of_head[:2] * 2 for of_head in columns]
    return [_decays(*parts, sizes) for parts in zip(rows, columns, strict=True)]
