"""The backward pass of linear attention on TPUs, with a decay per head or per step: from the last chunk to the first.

With S the memory before the chunk and dS' the gradient of the one after it, A = D * Q K^T and dA = dO V^T,

    dQ = (D * dA) K + from_start * dO S^T              dS = whole dS' + (from_start Q)^T dO
    dK = (D * dA)^T Q + to_end * V dS'^T               dV = A^T dO + (to_end * K) dS'

and a sum of log decays gains what is read under it, and loses what is written under it.
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
from ar_jax.kernels.linear_attention.pallas_tpu_blocks import COMPILER, LANES, dot, memories, memory, own, tokens
from ar_jax.kernels.linear_attention.pallas_tpu_decay import Sizes, cache, decays, sums_spec


def backward(
    sizes: Sizes,
    q: Array,
    k: Array,
    v: Array,
    sums: Array,
    bonus: Array | None,
    before: Array,
    dout: Array,
    dfinal: Array,
    *,
    decays: bool,
) -> tuple[Any, ...]:
    """See `differentiable`; arrays as in the forward pass, and before [B, T / C, N, H, E]."""
    batch, chunks, heads, *_ = before.shape
    group, chunk, dim, width, *_ = sizes
    back = lambda t: chunks - 1 - t  # noqa: E731
    keys, values = tokens(chunk, group * dim, back), tokens(chunk, group * width, back)
    states = memory(group, dim, width)
    own_bonus = pl.BlockSpec((1, group * dim), lambda b, n, t: (0, n))
    rows = (2 * group, chunk)
    outs: dict[str, tuple[pl.BlockSpec, Any]] = {
        "q": (keys, jax.ShapeDtypeStruct(q.shape, q.dtype)),
        "k": (keys, jax.ShapeDtypeStruct(k.shape, k.dtype)),
        "v": (values, jax.ShapeDtypeStruct(v.shape, v.dtype)),
        "state": (states, jax.ShapeDtypeStruct(dfinal.shape, jnp.float32)),
    }
    if decays:
        spec = pl.BlockSpec((1, 1, 1, *rows), lambda b, n, t: (b, n, back(t), 0, 0))
        outs["sums"] = spec, jax.ShapeDtypeStruct((batch, heads // group, chunks, *rows), jnp.float32)
    if bonus is not None:
        spec = pl.BlockSpec((1, 1, group * dim), lambda b, n, t: (b, 0, n))
        outs["bonus"] = spec, jax.ShapeDtypeStruct((batch, *bonus.shape), jnp.float32)
    bonuses = [] if bonus is None else [bonus]
    results = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, names=tuple(outs)),
        grid=(batch, heads // group, chunks),
        in_specs=[keys, keys, values, sums_spec(sums, sizes, chunks, back), memories(group, dim, width, place=back), values, states]
        + [own_bonus for _ in bonuses],
        out_specs=[spec for spec, _ in outs.values()],
        out_shape=[shape for _, shape in outs.values()],
        scratch_shapes=[pltpu.VMEM((group, dim, width), jnp.float32), *cache(sizes)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="linear_attention_backward",
    )(q, k, v, sums, before, dout, dfinal, *bonuses)
    found = dict(zip(outs, results, strict=True))
    dbonus = None if bonus is None else found["bonus"].sum(axis=0)
    dsums = _parts(found["sums"], sums, sizes) if decays else None
    return found["q"], found["k"], found["v"], dsums, dbonus, found["state"]


def _parts(found: Array, sums: Array, sizes: Sizes) -> Array:
    """The gradient of all parts of the sums from those of reading and writing; the exact parts have none."""
    if sums.shape[0] == 1:
        found = found.sum(axis=0, keepdims=True)
    if sizes.constant:
        found = jnp.concatenate([found[:, :, :-1].sum(axis=2, keepdims=True), found[:, :, -1:]], axis=2)
    reading, writing = jnp.split(found, 2, axis=3)
    nothing = jnp.zeros_like(reading)
    rows = jnp.concatenate([nothing, reading, nothing, writing], axis=3)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, sums.shape[3] - rows.shape[3]), (0, 0)])


def _kernel(q, k, v, sums, before, dout, dfinal, *rest, sizes: Sizes, names: tuple[str, ...]):
    """A chunk of a few heads. `rest`: the bonus if there is one, outputs by name, and scratch."""
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    outs, (carried, *cached) = dict(zip(names, rest, strict=False)), rest[len(names) :]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = dfinal[0]
        if bonus is not None:
            outs["bonus"][...] = jnp.zeros_like(outs["bonus"])

    decay = decays(sums, cached, sizes, 1)
    f32, dtype = jnp.float32, q.dtype
    for head in range(sizes.group):
        of_key = slice(head * sizes.dim, (head + 1) * sizes.dim)
        of_value = slice(head * sizes.width, (head + 1) * sizes.width)
        query, key, value, dread = q[0, :, of_key], k[0, :, of_key], v[0, :, of_value], dout[0, :, of_value]
        state, dstate = before[0, 0, head], carried[head]
        between, from_start, to_end, whole = decay(head)

        scores = between * dot(query, key, dtype, (1, 1))
        dscores = between * dot(dread, value, dtype, (1, 1))
        dread_from_start = from_start * dread.astype(f32)
        kept_keys = to_end * key.astype(f32)

        dquery_inside, dquery_carried = dot(dscores, key, dtype), dot(dread_from_start, state, dtype, (1, 1))
        dkey_inside, dkey_added = dot(dscores, query, dtype, (0, 0)), to_end * dot(value, dstate, dtype, (1, 1))
        dquery, dkey = dquery_inside + dquery_carried, dkey_inside + dkey_added
        dvalue = dot(scores, dread, dtype, (0, 0)) + dot(kept_keys, dstate, dtype)
        carried[head] = whole * dstate + dot(query, dread_from_start, dtype, (0, 0))

        if "sums" in outs:
            reading = (query.astype(f32) * dquery).sum(axis=1, keepdims=True)
            writing = -(key.astype(f32) * dkey).sum(axis=1, keepdims=True)
            at_end = (kept_keys * dot(value, dstate, dtype, (1, 1))).sum(axis=(0, 1), keepdims=True)
            at_end += (whole * state.astype(f32) * dstate).sum(axis=(0, 1), keepdims=True)
            last = jax.lax.broadcasted_iota(jnp.int32, writing.shape, 0) == sizes.chunk - 1
            writing += jnp.where(last, at_end, 0.0)
            for part, column in enumerate((reading, writing)):
                place = part * sizes.group + head
                outs["sums"][0, 0, 0, place : place + 1] = _row(column)
        if bonus is not None:
            weight, key32, query32 = bonus[:, of_key], key.astype(f32), query.astype(f32)
            down = (dread.astype(f32) * value.astype(f32)).sum(axis=1, keepdims=True)
            dquery += down * weight * key32
            dkey += down * weight * query32
            dvalue += own(query, key, weight) * dread.astype(f32)
            outs["bonus"][0, :, of_key] += (down * query32 * key32).sum(axis=0, keepdims=True)
        outs["q"][0, :, of_key] = dquery.astype(dtype)
        outs["k"][0, :, of_key] = dkey.astype(dtype)
        outs["v"][0, :, of_value] = dvalue.astype(dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        outs["state"][0] = carried[...]


def _row(column: Array) -> Array:
    """[C, 1] -> [1, C]."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]
