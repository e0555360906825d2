"""The delta rule on TPUs: a program keeps the memories of a few heads and walks through their chunks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.dispatch import interpreted

CHUNK = 128
LANES = 128
COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20)


def delta(
    q: Array, k: Array, v: Array, beta: Array, *, log_decay: Array, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `delta_attention`. Heads lie side by side in lanes, so nothing is transposed but beta and the sums of decays."""
    batch, length, heads, dim = q.shape
    width = v.shape[3]
    chunk = chunk_size or min(CHUNK, max(16, 1 << (length - 1).bit_length()))
    pad = -length % chunk

    def flat(x: Array) -> Array:
        return jnp.pad(x.reshape(batch, length, -1), [(0, 0), (0, pad), (0, 0)])

    beta, log_decay = (jnp.swapaxes(flat(x), 1, 2).reshape(batch, heads, -1, 1, chunk) for x in (beta, log_decay))
    sums = jnp.cumsum(log_decay, axis=-1)
    out, state = _delta(flat(q), flat(k), flat(v).astype(q.dtype), beta, sums, initial_state)
    return out[:, :length].reshape(batch, length, heads, width).astype(v.dtype), state


@jax.custom_vjp
def _delta(q: Array, k: Array, v: Array, beta: Array, sums: Array, state: Array) -> tuple[Array, Array]:
    """q, k, v [B, T, N H], beta and sums [B, N, T / C, 1, C], state [B, N, H, E]."""
    return _forward(q, k, v, beta, sums, state, keep=False)


def _delta_forward(*inputs: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, final, before, solved = _forward(*inputs, keep=True)
    return (out, final), (*inputs[:5], before, solved)


def _delta_backward(residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    return _backward(*residuals, *cotangents)


_delta.defvjp(_delta_forward, _delta_backward)


def heads_together(heads: int, dtype: Any, *dims: int) -> int:
    """How many heads a program takes: the matrix units wait unless several heads' products are under way.

    Eight of 128 channels in bfloat16, as far as memory goes. Lanes are cut in multiples of 128, or not at all.
    """
    most = max(1, 16 * LANES // max(LANES, *dims) // jnp.dtype(dtype).itemsize)
    able = [n for n in range(1, heads + 1) if heads % n == 0 and all(n * dim % LANES == 0 for dim in dims)]
    return max([n for n in able if n <= most], default=min(able, default=heads))


def specs(group: int, chunk: int, dim: int, width: int, place: Any) -> dict[str, pl.BlockSpec]:
    """Blocks of each kind of array; `place` says which chunk is the t-th."""
    return {
        "keys": pl.BlockSpec((1, chunk, group * dim), lambda b, n, t: (b, place(t), n)),
        "values": pl.BlockSpec((1, chunk, group * width), lambda b, n, t: (b, place(t), n)),
        "row": pl.BlockSpec((1, group, 1, 1, chunk), lambda b, n, t: (b, n, place(t), 0, 0)),
        "memory": pl.BlockSpec((1, group, dim, width), lambda b, n, t: (b, n, 0, 0)),
        "memories": pl.BlockSpec((1, group, 1, dim, width), lambda b, n, t: (b, n, place(t), 0, 0)),
        "inverses": pl.BlockSpec((1, group, 1, chunk, chunk), lambda b, n, t: (b, n, place(t), 0, 0)),
    }


def _forward(q: Array, k: Array, v: Array, beta: Array, sums: Array, state: Array, *, keep: bool) -> Any:
    batch, heads, dim, width = state.shape
    chunks, _, chunk = beta.shape[2:]
    group = heads_together(heads, q.dtype, dim, width)
    spec = specs(group, chunk, dim, width, lambda t: t)
    shapes = {
        "values": jax.ShapeDtypeStruct(v.shape, v.dtype),
        "memory": jax.ShapeDtypeStruct(state.shape, jnp.float32),
        "memories": jax.ShapeDtypeStruct((batch, heads, chunks, dim, width), q.dtype),
        "inverses": jax.ShapeDtypeStruct((batch, heads, chunks, chunk, chunk), q.dtype),
    }
    outs = list(shapes)[: 4 if keep else 2]
    return pl.pallas_call(
        functools.partial(_forward_kernel, dim=dim, width=width),
        grid=(batch, heads // group, chunks),
        in_specs=[spec[kind] for kind in ("keys", "keys", "values", "row", "row", "memory")],
        out_specs=[spec[kind] for kind in outs],
        out_shape=[shapes[kind] for kind in outs],
        scratch_shapes=[pltpu.VMEM((group, dim, width), jnp.float32)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="delta_attention_forward",
    )(q, k, v, beta, sums, state)


def _forward_kernel(q, k, v, beta, sums, start, out, final, *rest, dim, width):
    """A chunk of a few heads. `rest` is what is kept for backward, if anything, and the memory carried in scratch."""
    *kept, carried = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = start[0]

    state = carried[...]
    q, k, v = split(q, dim), split(k, dim), split(v, width)
    dtype, chunk = q.dtype, q.shape[1]
    beta = column(beta[0, :, 0])
    between, from_start, to_end = _decays(sums[0, :, 0])
    past, scores = _products(q, k, between)
    solved = inverse(beta * past, dtype)
    read = dot(jnp.concatenate([q, k], axis=1), state, dtype)
    surprise = v.astype(jnp.float32) - from_start * read[:, chunk:]
    written = dot(solved, beta * surprise, dtype)
    join(out, from_start * read[:, :chunk] + dot(scores, written, dtype))
    carried[...] = from_start[:, -1:] * state + dot(to_end * k.astype(jnp.float32), written, dtype, (1, 1))
    for ref, value in zip(kept, (state, solved), strict=False):
        ref[0, :, 0] = value.astype(ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        final[0] = carried[...]


def _backward(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    sums: Array,
    before: Array,
    solved: Array,
    dout: Array,
    dfinal: Array,
) -> Any:
    batch, heads, chunks, dim, width = before.shape
    chunk = beta.shape[-1]
    group = heads_together(heads, q.dtype, dim, width)
    spec = specs(group, chunk, dim, width, lambda t: chunks - 1 - t)
    ins = ("keys", "keys", "values", "row", "row", "memories", "inverses", "values", "memory")
    outs = ("keys", "keys", "values", "row", "row", "memory")
    return pl.pallas_call(
        functools.partial(_backward_kernel, dim=dim, width=width),
        grid=(batch, heads // group, chunks),
        in_specs=[spec[kind] for kind in ins],
        out_specs=[spec[kind] for kind in outs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, beta, sums, dfinal)],
        scratch_shapes=[pltpu.VMEM((group, dim, width), jnp.float32)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="delta_attention_backward",
    )(q, k, v, beta, sums, before, solved, dout, dfinal)


def _backward_kernel(
    q, k, v, beta, sums, before, solved, dout, dfinal, dq, dk, dv, dbeta, dsums, dstart, carried, *, dim, width
):
    """The chunks from the last to the first; `carried` is the gradient of the memory after the chunk."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = dfinal[0]

    dstate = carried[...]
    state, solved = before[0, :, 0], solved[0, :, 0]
    q, k, v, dout = split(q, dim), split(k, dim), split(v, width), split(dout, width)
    dtype, chunk = q.dtype, q.shape[1]
    beta = column(beta[0, :, 0])
    between, from_start, to_end = _decays(sums[0, :, 0])
    past, scores = _products(q, k, between)
    read = dot(jnp.concatenate([q, k], axis=1), state, dtype)
    surprise = v.astype(jnp.float32) - from_start * read[:, chunk:]
    written = dot(solved, beta * surprise, dtype)
    kept_keys = to_end * k.astype(jnp.float32)

    dwritten = dot(scores, dout, dtype, (1, 1)) + dot(kept_keys, dstate, dtype)
    dsolved = dot(solved, dwritten, dtype, (1, 1))  # of beta * surprise
    dscores = dot(dout, written, dtype, (2, 2))  # [t, j]
    dlower = -dot(dsolved, written, dtype, (2, 2))
    dkept_keys = dot(written, dstate, dtype, (2, 2))

    dread = jnp.concatenate([from_start * dout.astype(jnp.float32), -from_start * beta * dsolved], axis=1)
    from_state = dot(dread, state, dtype, (2, 2))
    dqk = between * dscores
    dkk = jnp.where(_later(between.shape), beta * between * dlower, 0.0)
    join(dq, from_state[:, :chunk] + dot(dqk, k, dtype))
    dkeys = from_state[:, chunk:] + to_end * dkept_keys + dot(dkk, k, dtype)
    join(dk, dkeys + dot(jnp.concatenate([dqk, dkk], axis=1), jnp.concatenate([q, k], axis=1), dtype, (1, 1)))
    join(dv, beta * dsolved)
    carried[...] = from_start[:, -1:] * dstate + dot(jnp.concatenate([q, k], axis=1), dread, dtype, (1, 1))

    of_lower = past * dlower
    of_pairs = scores * dscores + beta * of_lower
    of_end = (kept_keys * dkept_keys).sum(2, keepdims=True)
    of_memory = (from_start[:, -1:] * state.astype(jnp.float32) * dstate).sum((1, 2), keepdims=True)
    last = jax.lax.broadcasted_iota(jnp.int32, beta.shape, 1) == chunk - 1
    dsums_column = (
        of_pairs.sum(2, keepdims=True)
        + (read * dread).sum(2, keepdims=True).reshape(-1, 2, chunk, 1).sum(1)
        - of_end
        + jnp.where(last, of_end.sum(1, keepdims=True) + of_memory, 0.0)
    )
    dsums[0, :, 0] = _row(dsums_column) - of_pairs.sum(1, keepdims=True)
    dbeta[0, :, 0] = _row((dsolved * surprise).sum(2, keepdims=True) + of_lower.sum(2, keepdims=True))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        dstart[0] = carried[...]


def split(ref: Any, size: int) -> Array:
    """[1, C, G size] -> [G, C, size]."""
    return jnp.stack([ref[0, :, n : n + size] for n in range(0, ref.shape[2], size)])


def join(ref: Any, value: Array) -> None:
    """[G, C, size] -> [1, C, G size]."""
    size = value.shape[2]
    for n in range(value.shape[0]):
        ref[0, :, n * size : (n + 1) * size] = value[n].astype(ref.dtype)


def dot(x: Array, y: Array, dtype: Any, contract: tuple[int, int] = (2, 1)) -> Array:
    """A product of each head's matrices in that precision, summed in float32.

    Head by head: rounded to bfloat16 all at once, the matrices would be packed anew for the matrix unit (v5e).
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((contract[0] - 1,), (contract[1] - 1,)), ((), ()))
    return jnp.stack(
        [
            jax.lax.dot_general(
                a.astype(dtype), b.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32
            )
            for a, b in zip(x, y, strict=True)
        ]
    )


def inverse(lower: Array, dtype: Any) -> Array:
    """(I + lower)^-1 for strictly lower triangular matrices [G, C, C] whose size is a power of two.

    Blocks along the diagonal, of eight rows as registers are, are inverted by substitution. Then they are joined in pairs:
    the corner of a joined block is -(later inverse) (corner) (earlier inverse). No power of `lower` is formed, which could
    be large where the inverse is not. Blocks lie side by side, [G, block, C]: a product of such rows and a block diagonal
    matrix is one of all blocks at once, and costs the matrix unit no more than its rows.
    """
    size = lower.shape[1]
    row, col = places((1, size, size))
    ones = lambda where: where.astype(jnp.float32)  # factors, which the vector unit takes faster than choices  # noqa: E731
    block = min(8, size)
    found = _substitute(lower * ones(row // block == col // block), block, dtype)
    while block < size:
        is_late = ones(places((1, block, size))[1] // block % 2 == 1)
        late = found * is_late
        earlier = jnp.concatenate([found] * (size // block), axis=1) * ones(row // block == col // block)
        corner = lower * ones((row ^ col) // block == 1)
        joined = dot(dot(late, corner, dtype), earlier, dtype)
        found = jnp.concatenate([found - late, late - joined], axis=1)
        block *= 2
    return found


def _substitute(lower: Array, block: int, dtype: Any) -> Array:
    """The inverses [G, block, C], side by side, of I + the blocks along the diagonal of lower [G, C, C], zero elsewhere."""
    heads, size = lower.shape[:2]
    rows = lower.reshape(heads, size // block, block, size).sum(1)
    row, col = places((1, block, size))
    # Each column of a block copied to all of the block's columns, by one product for all.
    columns = jnp.concatenate([jnp.where(col % block == n, rows, 0.0) for n in range(block)], axis=1)
    row_of, col_of = places((1, size, size))
    same = (row_of // block == col_of // block).astype(jnp.float32)
    columns = dot(columns.reshape(1, -1, size), same, dtype).reshape(columns.shape)
    found = jnp.broadcast_to(jnp.where(row == col % block, 1.0, 0.0), rows.shape)
    for n in range(block - 1):
        found -= columns[:, n * block : (n + 1) * block] * found[:, n : n + 1]
    return found


def places(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The row and the column of each element of matrices [G, ...]."""
    row, col = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    return row, col


def _later(shape: tuple[int, ...]) -> Array:
    """Where the row's token comes after the column's."""
    row, col = places(shape)
    return row > col


def column(row: Array) -> Array:
    """[G, 1, C] -> [G, C, 1]."""
    return jnp.stack([jnp.transpose(jnp.broadcast_to(r, (8, r.shape[1])))[:, :1] for r in row])


def _row(col: Array) -> Array:
    """[G, C, 1] -> [G, 1, C]."""
    return jnp.stack([jnp.transpose(jnp.broadcast_to(c, (c.shape[0], LANES)))[:1] for c in col])


def _decays(sums: Array) -> tuple[Array, Array, Array]:
    """From sums [G, 1, C]: between tokens [G, C, C], zero above the diagonal; from the start and to the end, [G, C, 1]."""
    down = column(sums)
    row, col = places((sums.shape[0], sums.shape[2], sums.shape[2]))
    between = jnp.exp(jnp.where(row >= col, down - sums, -jnp.inf))
    return between, jnp.exp(down), jnp.exp(down[:, -1:] - down)


def _products(q: Array, k: Array, between: Array) -> tuple[Array, Array]:
    """What keys read of the keys written before them, and what queries read."""
    size = q.shape[1]
    both = dot(jnp.concatenate([k, q], axis=1), k, q.dtype, (2, 2))
    return jnp.where(_later(between.shape), between * both[:, :size], 0.0), between * both[:, size:]
