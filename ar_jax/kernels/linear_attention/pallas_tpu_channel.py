"""Linear attention on TPUs with a decay per channel.

As in xla.py, blocks of 1, 2, 4, ... tokens are joined in pairs, and where the later block reads the earlier one, the decay is
split at the border. At each such level a row is either a reader or a writer, so one matrix holds both,

    X_t = exp(e_t) (q_t if t lies in a later block else k_t),   e_t the sum of log decays between t and the border,

and X X^T holds what the level adds to the scores, once as it is and once turned. No exponent is positive, and no sum is the
difference of two. Memories are turned here, [E, H], so that channels lie in lanes as they do in q and k.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.dispatch import interpreted
from ar_jax.kernels.linear_attention.pallas_tpu_blocks import COMPILER, dot, memories, memory, places, slices, tokens
from ar_jax.kernels.linear_attention.pallas_tpu_decay import Sizes

SUBLANES = 8


def forward(
    sizes: Sizes, q: Array, k: Array, v: Array, decay: Array, bonus: Array | None, state: Array, *, keep: bool
) -> tuple[Array, Array, Array | None]:
    """See `differentiable`: q, k and decay [B, T, N H], v [B, T, N E], bonus [1, N H], state [B, N, E, H]."""
    batch, length, _ = q.shape
    group, chunk, dim, width, *_ = sizes
    chunks, heads = length // chunk, state.shape[1]
    same = lambda t: t  # noqa: E731
    keys, values = tokens(chunk, group * dim, same), tokens(chunk, group * width, same)
    states = memory(group, width, dim)
    kept = memories(group, width, dim, place=same), jax.ShapeDtypeStruct((batch, chunks, heads, width, dim), q.dtype)
    bonuses = [] if bonus is None else [bonus]
    out, final, *before = pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes),
        grid=(batch, heads // group, chunks),
        in_specs=[keys, keys, values, keys, states]
        + [pl.BlockSpec((1, group * dim), lambda b, n, t: (0, n)) for _ in bonuses],
        out_specs=[values, states] + [kept[0]] * keep,
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
        + [kept[1]] * keep,
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="linear_attention_channel_forward",
    )(q, k, v, decay, state, *bonuses)
    return out, final, before[0] if keep else None


def _forward_kernel(q, k, v, decay, start, *rest, sizes: Sizes):
    """A chunk of a few heads. `rest`: the bonus if there is one, and outputs; the memory is carried in `after`."""
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    out, after, *before = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        after[...] = start[...]

    f32, dtype = jnp.float32, q.dtype
    level = _levels(sizes.chunk)
    row, column = places((sizes.chunk, sizes.chunk))
    for n, (of_key, of_value) in enumerate(
        zip(slices(sizes.group, sizes.dim), slices(sizes.group, sizes.width), strict=True)
    ):
        query, key, value, state = q[0, :, of_key], k[0, :, of_key], v[0, :, of_value], after[0, n]
        exponents, reading, writing, whole = _sums(decay[0, :, of_key], sizes.strict)
        own = query if bonus is None else query.astype(f32) * bonus[:, of_key]
        scores = jnp.where(row == column, dot(own, key, dtype, (1, 1)), 0.0)
        for i, exponent in enumerate(exponents):
            both = _readers_and_writers(query, key, exponent, i).astype(dtype)
            scores = jnp.where((level == i) & (row > column), dot(both, both, dtype, (1, 1)), scores)
        from_start, to_end = jnp.exp(reading) * query.astype(f32), jnp.exp(writing) * key.astype(f32)
        read = dot(scores, value, dtype) + dot(from_start, state, dtype, (1, 1))
        out[0, :, of_value] = read.astype(dtype)
        after[0, n] = jnp.exp(whole[:1]) * state + dot(value, to_end, dtype, (0, 0))
        for ref in before:
            ref[0, 0, n] = state.astype(dtype)


def backward(
    sizes: Sizes,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    bonus: Array | None,
    before: Array,
    dout: Array,
    dfinal: Array,
    *,
    with_decay: bool,
) -> tuple[Any, ...]:
    """See `differentiable`; arrays as in the forward pass, and before [B, T / C, N, E, H]."""
    batch, chunks, heads, *_ = before.shape
    group, chunk, dim, width, *_ = sizes
    back = lambda t: chunks - 1 - t  # noqa: E731
    keys, values = tokens(chunk, group * dim, back), tokens(chunk, group * width, back)
    states = memory(group, width, dim)
    outs: dict[str, tuple[pl.BlockSpec, Any]] = {
        "q": (keys, jax.ShapeDtypeStruct(q.shape, q.dtype)),
        "k": (keys, jax.ShapeDtypeStruct(k.shape, k.dtype)),
        "v": (values, jax.ShapeDtypeStruct(v.shape, v.dtype)),
        "state": (states, jax.ShapeDtypeStruct(dfinal.shape, jnp.float32)),
    }
    if with_decay:
        outs["decay"] = keys, jax.ShapeDtypeStruct(decay.shape, jnp.float32)
    if bonus is not None:
        spec = pl.BlockSpec((1, 1, group * dim), lambda b, n, t: (b, 0, n))
        outs["bonus"] = spec, jax.ShapeDtypeStruct((batch, *bonus.shape), jnp.float32)
    bonuses = [] if bonus is None else [bonus]
    results = pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes, names=tuple(outs)),
        grid=(batch, heads // group, chunks),
        in_specs=[keys, keys, values, keys, memories(group, width, dim, place=back), values, states]
        + [pl.BlockSpec((1, group * dim), lambda b, n, t: (0, n)) for _ in bonuses],
        out_specs=[spec for spec, _ in outs.values()],
        out_shape=[shape for _, shape in outs.values()],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="linear_attention_channel_backward",
    )(q, k, v, decay, before, dout, dfinal, *bonuses)
    found = dict(zip(outs, results, strict=True))
    dbonus = None if bonus is None else found["bonus"].sum(axis=0)
    return found["q"], found["k"], found["v"], found.get("decay"), dbonus, found["state"]


def _backward_kernel(q, k, v, decay, before, dout, dfinal, *rest, sizes: Sizes, names: tuple[str, ...]):
    """A chunk of a few heads. `rest`: the bonus if there is one, and outputs by name.

    The gradient of the memory is carried in the output "state".
    """
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    outs = dict(zip(names, rest, strict=True))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        outs["state"][...] = dfinal[...]
        if bonus is not None:
            outs["bonus"][...] = jnp.zeros_like(outs["bonus"])

    f32, dtype = jnp.float32, q.dtype
    level = _levels(sizes.chunk)
    row, column = places((sizes.chunk, sizes.chunk))
    for n, (of_key, of_value) in enumerate(
        zip(slices(sizes.group, sizes.dim), slices(sizes.group, sizes.width), strict=True)
    ):
        query, key, value, dread = q[0, :, of_key], k[0, :, of_key], v[0, :, of_value], dout[0, :, of_value]
        query32, key32 = query.astype(f32), key.astype(f32)
        state, dafter = before[0, 0, n], outs["state"][0, n]
        exponents, reading, writing, whole = _sums(decay[0, :, of_key], sizes.strict)

        own = query if bonus is None else query32 * bonus[:, of_key]
        down, turned = dot(dread, value, dtype, (1, 1)), dot(value, dread, dtype, (1, 1))
        dscores = jnp.where(row > column, down, turned)  # both halves: of readers and of writers
        downs = jnp.where(row == column, dscores, 0.0)
        down, dkey = dot(downs, key, dtype), dot(downs, own, dtype)
        dquery = down if bonus is None else down * bonus[:, of_key]
        if bonus is not None:
            outs["bonus"][0, :, of_key] += (down * query32).sum(axis=0, keepdims=True)

        scores = jnp.where(row == column, dot(key, own, dtype, (1, 1)), 0.0)  # turned
        dexponents = []
        for i, exponent in enumerate(exponents):
            both = _readers_and_writers(query, key, exponent, i)
            low = both.astype(dtype)
            scores = jnp.where((level == i) & (row < column), dot(low, low, dtype, (1, 1)), scores)
            dboth = dot(jnp.where(level == i, dscores, 0.0), low, dtype)
            late, dexponent = _late(both.shape, i), jnp.exp(exponent) * dboth
            dquery, dkey = jnp.where(late, dquery + dexponent, dquery), jnp.where(late, dkey, dkey + dexponent)
            dexponents.append(both * dboth)

        decay_to, decay_from = jnp.exp(reading), jnp.exp(writing)
        from_start, to_end = decay_to * query32, decay_from * key32
        dfrom_start, dto_end = dot(dread, state, dtype), dot(value, dafter, dtype)
        dvalue = dot(scores, dread, dtype) + dot(to_end, dafter, dtype, (1, 1))
        outs["q"][0, :, of_key] = (dquery + decay_to * dfrom_start).astype(dtype)
        outs["k"][0, :, of_key] = (dkey + decay_from * dto_end).astype(dtype)
        outs["v"][0, :, of_value] = dvalue.astype(dtype)
        outs["state"][0, n] = jnp.exp(whole[:1]) * dafter + dot(dread, from_start, dtype, (0, 0))
        if "decay" in outs:
            dwhole = jnp.exp(whole[:1]) * (state.astype(f32) * dafter).sum(axis=0, keepdims=True)
            ends = from_start * dfrom_start, to_end * dto_end, dwhole
            outs["decay"][0, :, of_key] = _dsums(dexponents, *ends, sizes.strict)


def _levels(chunk: int) -> Array:
    """[C, C]: at which level tokens of a row and of a column meet, their blocks then measuring 2^level; -1 for one token."""
    row, column = places((chunk, chunk))
    apart = row ^ column
    return sum(((apart >= 1 << i).astype(jnp.int32) for i in range(chunk.bit_length() - 1)), jnp.full_like(row, -1))


def _late(shape: tuple[int, ...], level: int) -> Array:
    """Where a row lies in the later block of its pair."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >> level) & 1 == 1


def _sums(log_decay: Array, strict: bool) -> tuple[list[Array], Array, Array, Array]:
    """Sums of log decays [C, H]: of each level, from the start to where tokens read, from tokens to the end, and of all."""
    total, after = log_decay, jnp.zeros_like(log_decay)
    before = after if strict else log_decay
    exponents = []
    for i in range(log_decay.shape[0].bit_length() - 1):
        late, other = _late(total.shape, i), _exchanged(total, i)
        exponents.append(jnp.where(late, before, after))
        before, after = jnp.where(late, before + other, before), jnp.where(late, after, after + other)
        total += other
    return exponents, before, after, total


def _dsums(dexponents: list[Array], dbefore: Array, dafter: Array, dwhole: Array, strict: bool) -> Array:
    """The gradient of log_decay from those of what `_sums` returns, that of all as one row."""
    first = jax.lax.broadcasted_iota(jnp.int32, dbefore.shape, 0) == 0
    dtotal = jnp.where(first, dwhole, 0.0)
    for i, dexponent in reversed(list(enumerate(dexponents))):
        late = _late(dbefore.shape, i)
        dtotal += _exchanged(jnp.where(late, dbefore, dafter) + dtotal, i)
        dbefore, dafter = jnp.where(late, dbefore + dexponent, dbefore), jnp.where(late, dafter, dafter + dexponent)
    return dtotal if strict else dtotal + dbefore


def _exchanged(x: Array, level: int) -> Array:
    """Rows [C, H] of each pair of blocks, the later block first."""
    size = 1 << level
    if size >= SUBLANES or interpreted():
        pairs = x.reshape(-1, 2, size, x.shape[1])
        return jnp.concatenate([pairs[:, 1:], pairs[:, :1]], axis=1).reshape(x.shape)
    late = _late(x.shape, level)
    return jnp.where(late, pltpu.roll(x, size, 0), pltpu.roll(x, x.shape[0] - size, 0))


def _readers_and_writers(query: Array, key: Array, exponent: Array, level: int) -> Array:
    """X of a level, float32."""
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    return jnp.exp(exponent) * jnp.where(_late(exponent.shape, level), query, key)
