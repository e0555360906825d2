"""Linear attention on TPUs with a decay per channel.

As in xla.py, blocks of 1, 2, 4, ... tokens are joined in pairs, and where the later block reads the earlier one, the decay is
split at the border. At each such level a row is either a reader or a writer, so one matrix holds both,

    X_t = d_t (q_t if t lies in a later block else k_t),   d_t the decay between t and the border,

and X X^T holds what the level adds to the scores, once as it is and once turned. Decays of a level are products of those of
the level before: no exponent is positive, and no sum is the difference of two. Memories are turned here, [E, H], so that
channels lie in lanes as they do in q and k.
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
TOGETHER = 2  # heads whose steps alternate: more would not fit into the registers


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


def _forward_kernel(q, k, v, decay, start, *rest, sizes):
    """A chunk of a few heads. `rest`: the bonus if there is one, and outputs; the memory is carried in `after`."""
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    out, after, *before = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        after[...] = start[...]

    f32, dtype = jnp.float32, q.dtype
    row, column = places((sizes.chunk, sizes.chunk))
    level = jnp.where(row > column, _levels(sizes.chunk), -1)
    heads = range(sizes.group)
    of_key, of_value = (slices(sizes.group, size) for size in (sizes.dim, sizes.width))
    query, key, value = ([x[0, :, of] for of in each] for x, each in ((q, of_key), (k, of_key), (v, of_value)))
    own = [query[n] if bonus is None else query[n].astype(f32) * bonus[:, of_key[n]] for n in heads]
    for some in [heads[n : n + TOGETHER] for n in range(0, sizes.group, TOGETHER)]:
        decays = {n: _decays(decay[0, :, of_key[n]], sizes.strict) for n in some}
        scores = {n: jnp.where(row == column, dot(own[n], key[n], dtype, (1, 1)), 0.0) for n in some}
        for i in range(sizes.chunk.bit_length() - 1):
            for n in some:
                both = decays[n][0][i] * _chosen(key[n].astype(f32), query[n].astype(f32), i)
                scores[n] = _with_level(scores[n], both, level, i, dtype)
        for n in some:
            from_start, to_end, whole = decays[n][1:]
            state = after[0, n]
            for ref in before:
                ref[0, 0, n] = state.astype(dtype)
            read = dot(scores[n], value[n], dtype) + dot(from_start * query[n].astype(f32), state, dtype, (1, 1))
            out[0, :, of_value[n]] = read.astype(dtype)
            after[0, n] = whole * state + dot(value[n], to_end * key[n].astype(f32), dtype, (0, 0))


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


def _backward_kernel(q, k, v, decay, before, dout, dfinal, *rest, sizes, names):
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
        decays, from_start, to_end, whole = _decays(decay[0, :, of_key], sizes.strict)

        own = query if bonus is None else query32 * bonus[:, of_key]
        down, turned = dot(dread, value, dtype, (1, 1)), dot(value, dread, dtype, (1, 1))
        dscores = jnp.where(row > column, down, turned)  # both halves: of readers and of writers
        downs = jnp.where(row == column, dscores, 0.0)
        down, dkey = dot(downs, key, dtype), dot(downs, own, dtype)
        dquery = down if bonus is None else down * bonus[:, of_key]
        if bonus is not None:
            outs["bonus"][0, :, of_key] += (down * query32).sum(axis=0, keepdims=True)

        scores = jnp.where(row == column, dot(key, own, dtype, (1, 1)), 0.0)  # turned
        dsums = []
        for i, of_level in enumerate(decays):
            both = of_level * _chosen(key32, query32, i)
            low = both.astype(dtype)
            scores = jnp.where((level == i) & (row < column), dot(low, low, dtype, (1, 1)), scores)
            dboth = dot(jnp.where(level == i, dscores, 0.0), low, dtype)
            dquery, dkey = (
                _chosen(dquery, dquery + of_level * dboth, i),
                _chosen(dkey + of_level * dboth, dkey, i),
            )
            dsums.append(both * dboth)

        query_kept, key_kept = from_start * query32, to_end * key32
        dquery_kept, dkey_kept = dot(dread, state, dtype), dot(value, dafter, dtype)
        dvalue = dot(scores, dread, dtype) + dot(key_kept, dafter, dtype, (1, 1))
        outs["q"][0, :, of_key] = (dquery + from_start * dquery_kept).astype(dtype)
        outs["k"][0, :, of_key] = (dkey + to_end * dkey_kept).astype(dtype)
        outs["v"][0, :, of_value] = dvalue.astype(dtype)
        outs["state"][0, n] = whole * dafter + dot(dread, query_kept, dtype, (0, 0))
        if "decay" in outs:
            dwhole = whole * (state.astype(f32) * dafter).sum(axis=0, keepdims=True)
            ends = query_kept * dquery_kept, key_kept * dkey_kept, dwhole
            outs["decay"][0, :, of_key] = _dlog_decay(dsums, *ends, sizes.strict)


def _levels(chunk: int) -> Array:
    """[C, C]: the level at which tokens of a row and of a column meet, out of blocks of 2^level; -1 for one token."""
    row, column = places((chunk, chunk))
    apart = row ^ column
    return sum(((apart >= 1 << i).astype(jnp.int32) for i in range(chunk.bit_length() - 1)), jnp.full_like(row, -1))


def _with_level(scores: Array, both: Array, level: Array, i: int, dtype: Any) -> Array:
    """Scores, and what later blocks read of earlier ones at level i, where X is `both`.

    From whole registers on only readers are rows of the product. It also fills what levels above will fill anew.
    """
    size, low = 1 << i, both.astype(dtype)
    if size < SUBLANES:
        return jnp.where(level == i, dot(low, low, dtype, (1, 1)), scores)
    (_, readers), (kept, before) = (_halves(x, size) for x in (both, scores))
    row, column = places((before.shape[0], before.shape[1]))
    found = jnp.where(column < (2 * (row >> i) + 1) * size, dot(readers, low, dtype, (1, 1)), before)
    return _joined(kept, found, size)


def _decays(log_decay: Array, strict: bool) -> tuple[list[Array], Array, Array, Array]:
    """Decays [C, H]: of each level, from the start to where tokens read, from after tokens to the end; and over all, [1, H]."""
    total, after = jnp.exp(log_decay), jnp.ones_like(log_decay)
    before = after if strict else total
    decays = []
    for i in range(log_decay.shape[0].bit_length() - 1):
        of_level, other = _chosen(after, before, i), _exchanged(total, i)
        decays.append(of_level)
        further = of_level * other
        before, after = _chosen(before, further, i), _chosen(further, after, i)
        total *= other
    return decays, before, after, total[:1]


def _dlog_decay(dsums: list[Array], dbefore: Array, dafter: Array, dwhole: Array, strict: bool) -> Array:
    """The gradient of log_decay from those of the logarithms of what `_decays` returns."""
    first = jax.lax.broadcasted_iota(jnp.int32, dbefore.shape, 0) == 0
    dtotal = jnp.where(first, dwhole, 0.0)
    for i, dsum in reversed(list(enumerate(dsums))):
        dtotal += _exchanged(_chosen(dafter, dbefore, i) + dtotal, i)
        dbefore, dafter = _chosen(dbefore, dbefore + dsum, i), _chosen(dafter + dsum, dafter, i)
    return dtotal if strict else dtotal + dbefore


def _chosen(early: Array, late: Array, i: int) -> Array:
    """Rows of the earlier blocks of each pair of level i from one array, and of the later blocks from the other."""
    size = 1 << i
    if size >= SUBLANES:  # whole registers: nothing is computed
        return _joined(_halves(early, size)[0], _halves(late, size)[1], size)
    row = jax.lax.broadcasted_iota(jnp.int32, early.shape, 0)
    return jnp.where((row >> i) & 1 == 1, late, early)


def _exchanged(x: Array, i: int) -> Array:
    """Rows of each pair of blocks of level i, the later block first."""
    size = 1 << i
    if size >= SUBLANES:
        return _joined(*_halves(x, size)[::-1], size)
    tiles = x.reshape(-1, min(SUBLANES, x.shape[0]), x.shape[1])
    forth, back = (pltpu.roll(tiles, shift, 1).reshape(x.shape) for shift in (size, tiles.shape[1] - size))
    return _chosen(back, forth, i) if 2 * size < tiles.shape[1] else forth


def _halves(x: Array, size: int) -> tuple[Array, Array]:
    """Rows of the earlier and of the later blocks."""
    pairs = x.reshape(-1, 2, size, x.shape[1])
    return pairs[:, 0].reshape(-1, x.shape[1]), pairs[:, 1].reshape(-1, x.shape[1])


def _joined(early: Array, late: Array, size: int) -> Array:
    """What `_halves` took apart."""
    return jnp.stack([x.reshape(-1, size, x.shape[1]) for x in (early, late)], axis=1).reshape(-1, early.shape[1])
