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

from ar_jax.kernels.dispatch import interpreted
from ar_jax.kernels.linear_attention.pallas_tpu_blocks import (
    COMPILER,
    dot,
    memories,
    memory,
    own,
    row_sums,
    slices,
    tokens,
)
from ar_jax.kernels.linear_attention.pallas_tpu_decay import Sizes, decays, specs


def backward(
    sizes: Sizes,
    q: Array,
    k: Array,
    v: Array,
    decay: tuple[Array, ...],
    bonus: Array | None,
    before: Array,
    dout: Array,
    dfinal: Array,
    *,
    with_decay: bool,
) -> tuple[Any, ...]:
    """See `differentiable`; arrays as in the forward pass, and before [B, T / C, N, H, E]."""
    batch, chunks, heads, *_ = before.shape
    group, chunk, dim, width, *_ = sizes
    back = lambda t: chunks - 1 - t  # noqa: E731
    keys, values = tokens(chunk, group * dim, back), tokens(chunk, group * width, back)
    states = memory(group, dim, width)
    outs: dict[str, tuple[pl.BlockSpec, Any]] = {
        "q": (keys, jax.ShapeDtypeStruct(q.shape, q.dtype)),
        "k": (keys, jax.ShapeDtypeStruct(k.shape, k.dtype)),
        "v": (values, jax.ShapeDtypeStruct(v.shape, v.dtype)),
        "state": (states, jax.ShapeDtypeStruct(dfinal.shape, jnp.float32)),
    }
    if with_decay:
        rows = ((1 + sizes.strict) * group, chunk)
        spec = pl.BlockSpec((1, 1, 1, *rows), lambda b, n, t: (b, n, back(t), 0, 0))
        outs["sums"] = spec, jax.ShapeDtypeStruct((batch, heads // group, chunks, *rows), jnp.float32)
    if bonus is not None:
        spec = pl.BlockSpec((1, 1, group * dim), lambda b, n, t: (b, 0, n))
        outs["bonus"] = spec, jax.ShapeDtypeStruct((batch, *bonus.shape), jnp.float32)
    bonuses = [] if bonus is None else [bonus]
    results = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, names=tuple(outs)),
        grid=(batch, heads // group, chunks),
        in_specs=[keys, keys, values, memories(group, dim, width, place=back), values, states]
        + [pl.BlockSpec((1, group * dim), lambda b, n, t: (0, n)) for _ in bonuses]
        + specs(decay, sizes, chunks, back),
        out_specs=[spec for spec, _ in outs.values()],
        out_shape=[shape for _, shape in outs.values()],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="linear_attention_backward",
    )(q, k, v, before, dout, dfinal, *bonuses, *decay)
    found = dict(zip(outs, results, strict=True))
    dbonus = None if bonus is None else found["bonus"].sum(axis=0)
    ddecay = (_parts(found["sums"], decay[0], sizes), *[None] * (len(decay) - 1)) if with_decay else None
    return found["q"], found["k"], found["v"], ddecay, dbonus, found["state"]


def _parts(found: Array, sums: Array, sizes: Sizes) -> Array:
    """The gradient of the parts of the sums; the exact ones have none.

    Args:
      found: rows for what tokens read and write together, and, where tokens read at sums of their own, rows for these.
      sums: what the gradient is of.
      sizes: of the kernel.
    """
    if sums.shape[0] == 1:
        found = found.sum(axis=0, keepdims=True)
    if sizes.constant:
        found = jnp.concatenate([found[:, :, :-1].sum(axis=2, keepdims=True), found[:, :, -1:]], axis=2)
    both, reading = jnp.split(found, 2, axis=3) if sizes.strict else (found, jnp.zeros_like(found))
    nothing = jnp.zeros_like(both)
    rows = jnp.concatenate([nothing, reading, nothing, both - reading], axis=3)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, sums.shape[3] - rows.shape[3]), (0, 0)])


def _kernel(q, k, v, before, dout, dfinal, *rest, sizes, names):
    """A chunk of a few heads. `rest`: the bonus if there is one, decays, and outputs by name.

    The gradient of the memory is carried in the output "state".
    """
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    num_decays = 4 if sizes.constant else 1
    decay_blocks, outs = rest[:num_decays], dict(zip(names, rest[num_decays:], strict=True))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        outs["state"][...] = dfinal[...]
        if bonus is not None:
            outs["bonus"][...] = jnp.zeros_like(outs["bonus"])

    f32, dtype, heads = jnp.float32, q.dtype, range(sizes.group)
    of_key, of_value = (slices(sizes.group, size) for size in (sizes.dim, sizes.width))
    query, key = ([x[0, :, of] for of in of_key] for x in (q, k))
    value, dread = ([x[0, :, of] for of in of_value] for x in (v, dout))
    state, dafter, decay = (
        [before[0, 0, n] for n in heads],
        [outs["state"][0, n] for n in heads],
        decays(decay_blocks, sizes),
    )

    dread_kept = [(decay[n].from_start * dread[n].astype(f32)).astype(dtype) for n in heads]
    value_kept = [(decay[n].to_end * value[n].astype(f32)).astype(dtype) for n in heads]
    dscores = [decay[n].between * dot(dread[n], value[n], dtype, (1, 1)) for n in heads]
    scores = [decay[n].between * dot(query[n], key[n], dtype, (1, 1)) for n in heads]
    dquery = [dot(dscores[n], key[n], dtype) + dot(dread_kept[n], state[n], dtype, (1, 1)) for n in heads]
    dkey = [dot(dscores[n], query[n], dtype, (0, 0)) + dot(value_kept[n], dafter[n], dtype, (1, 1)) for n in heads]
    dvalue_added = [decay[n].to_end * dot(key[n], dafter[n], dtype) for n in heads]
    dvalue = [dot(scores[n], dread[n], dtype, (0, 0)) + dvalue_added[n] for n in heads]
    dstate = [decay[n].whole * dafter[n] + dot(query[n], dread_kept[n], dtype, (0, 0)) for n in heads]

    if "sums" in outs:
        last = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.chunk), 1) == sizes.chunk - 1
        for n in heads:
            at_end = (value[n].astype(f32) * dvalue_added[n]).sum(axis=(0, 1), keepdims=True)
            at_end += (decay[n].whole * state[n].astype(f32) * dafter[n]).sum(axis=(0, 1), keepdims=True)
            reading = query[n].astype(f32) * dquery[n]
            both = row_sums(reading - key[n].astype(f32) * dkey[n], dtype) + jnp.where(last, at_end, 0.0)
            outs["sums"][0, 0, 0, n : n + 1] = both
            if sizes.strict:
                outs["sums"][0, 0, 0, sizes.group + n : sizes.group + n + 1] = row_sums(reading, dtype)
    if bonus is not None:
        for n in heads:
            weight, query32, key32 = bonus[:, of_key[n]], query[n].astype(f32), key[n].astype(f32)
            down = (dread[n].astype(f32) * value[n].astype(f32)).sum(axis=1, keepdims=True)
            dquery[n] += down * weight * key32
            dkey[n] += down * weight * query32
            dvalue[n] += own(query[n], key[n], weight) * dread[n].astype(f32)
            outs["bonus"][0, :, of_key[n]] += (down * query32 * key32).sum(axis=0, keepdims=True)
    for n in heads:
        outs["q"][0, :, of_key[n]] = dquery[n].astype(dtype)
        outs["k"][0, :, of_key[n]] = dkey[n].astype(dtype)
        outs["v"][0, :, of_value[n]] = dvalue[n].astype(dtype)
        outs["state"][0, n] = dstate[n]
