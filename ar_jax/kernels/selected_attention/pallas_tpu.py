"""A few queries that name blocks of a long cache, on TPUs: only what is named leaves the memory.

The named blocks' numbers are prefetched as scalars, and say which block each grid step fetches; several at a time, since one
of 64 keys is fetched sooner than a grid step is begun. Where a query names fewer than it might (the gate of SeerAttention-R
cuts at a threshold, arXiv:2506.08889, sec. 2.3) its last block is named again, which is not fetched again.
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
from ar_jax.kernels.selected_attention.xla import xla
from ar_jax.kernels.step_attention.visibility import UNSEEN

LANES, ROWS = 128, 16  # a vector register's lanes; query rows are padded to tiles of so many sublanes
MOST_QUERIES = 16  # more gather their blocks together
FETCHED_KEYS = 1024  # at once, of each key head: a quarter of a MiB of keys 128 wide


def pallas_tpu(
    q: Array, k: Array, v: Array, begin: Array, limit: Array, *, block_size: int, aligned: bool, scale: float
) -> tuple[Array, Array]:
    """See `selected_attention`. Many queries, and blocks that are no whole tiles of the memory, are gathered as by `xla`."""
    tile = 32 // k.dtype.itemsize  # sublanes
    whole = block_size % tile == 0 and (interpreted() or q.shape[-1] % LANES == 0)
    if aligned and whole and q.shape[1] <= MOST_QUERIES:
        return _decode(q, k, v, begin, limit, block_size, scale)
    return xla(q, k, v, begin, limit, block_size=block_size, aligned=aligned, scale=scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _decode(
    q: Array, k: Array, v: Array, begin: Array, limit: Array, block_size: int, scale: float
) -> tuple[Array, Array]:
    batch, length, heads, width = q.shape
    shared, own = k.shape[2], begin.shape[2]
    each = heads // own  # query heads that read the same blocks
    named, count = named_first(begin // block_size, begin >= 0)
    slots = max(1, min(FETCHED_KEYS // block_size, begin.shape[3]))
    pad = -begin.shape[3] % slots
    named = jnp.pad(named, ((0, 0),) * 3 + ((0, pad),), mode="edge")
    visits = named.shape[3] // slots
    rows = each + -each % ROWS
    ragged = k.shape[1] % block_size > 0
    queries = q.reshape(batch * length, own, each, width)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - each), (0, 0)))
    k, v = (_left_in_place(jnp.swapaxes(a, 1, 2)) for a in (k, v))  # [B, K, S, H]

    def block(slot: int) -> pl.BlockSpec:
        def at(i: Any, h: Any, visit: Any, named: Any, count: Any, limit: Any) -> Any:
            return i // length, h * shared // own, named[((i * own + h) * visits + visit) * slots + slot], 0

        return pl.BlockSpec((None, None, block_size, width), at)

    def one(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda i, h, visit, *scalars: (i, h, 0, 0))

    parts = [block(slot) for slot in range(slots)]
    out, lse = pl.pallas_call(
        functools.partial(_kernel, slots=slots, visits=visits, heads=own, ragged=ragged, scale=scale),
        name="selected_attention_decode",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch * length, own, visits),
            in_specs=[one(rows, width), *parts, *parts],
            out_specs=[one(rows, width), one(rows, 1)],
            scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (width, 1, 1)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch * length, own, rows, width), v.dtype),
            jax.ShapeDtypeStruct((batch * length, own, rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpreted(),
    )(named.reshape(-1), count.reshape(-1), limit.reshape(-1), queries, *[k] * slots, *[v] * slots)
    return out[:, :, :each].reshape(q.shape).astype(v.dtype), lse[:, :, :each, 0].reshape(q.shape[:3])


def named_first(block: Array, there: Array) -> tuple[Array, Array]:
    """Blocks [..., M], those that are there in front, the last of them repeated behind; and how many these are, [...]."""
    order = jnp.argsort(~there, axis=-1, stable=True)
    count = there.sum(axis=-1, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)[..., None]
    index = jnp.minimum(jnp.arange(block.shape[-1], dtype=jnp.int32).reshape((1,) * (block.ndim - 1) + (-1,)), last)
    return jnp.maximum(jnp.take_along_axis(block, jnp.take_along_axis(order, index, axis=-1), axis=-1), 0), count


def _left_in_place(array: Array) -> Array:
    """Keeps the compiler from bringing all of it on chip beforehand, where it fits: only what is named is read."""
    return array if interpreted() else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _kernel(
    named: Any,
    count: Any,
    limit: Any,
    q: Any,
    *refs: Any,
    slots: int,
    visits: int,
    heads: int,
    ragged: bool,
    scale: float,
) -> None:
    """Query rows along sublanes, keys along lanes."""
    keys, values, (out, lse, total, weight, peak) = refs[:slots], refs[slots : 2 * slots], refs[2 * slots :]
    example, head, visit = (pl.program_id(axis) for axis in range(3))
    own = example * heads + head
    size = keys[0].shape[0]

    @pl.when(visit == 0)
    def begin() -> None:
        peak[...] = jnp.full(peak.shape, UNSEEN, jnp.float32)
        weight[...] = jnp.zeros(weight.shape, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(visit * slots < count[own])
    def read() -> None:
        # How many keys of each fetched block are read.
        readable = [
            jnp.where(
                visit * slots + slot < count[own],
                limit[example] - named[(own * visits + visit) * slots + slot] * size,
                0,
            )
            for slot in range(slots)
        ]

        def seen(axis: int, shape: tuple[int, ...]) -> Array:
            lane = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            bound = jnp.full(shape, readable[0], jnp.int32)
            for slot in range(1, slots):
                bound = jnp.where(lane >= slot * size, readable[slot] + slot * size, bound)
            return lane < bound

        k, v = (jnp.concatenate([ref[...] for ref in part], axis=0) for part in (keys, values))
        if ragged:  # the last block reaches beyond the cache, where anything may lie
            v = jnp.where(seen(0, v.shape), v, jnp.zeros((), v.dtype))
        product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        logits = product(q[...], k, (((1,), (1,)), ((), ()))) * scale
        here = seen(1, logits.shape)
        logits = jnp.where(here, logits, UNSEEN)
        before = peak[...]
        higher = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        weights, fade = jnp.where(here, jnp.exp(logits - higher), 0.0), jnp.exp(before - higher)
        peak[...] = higher
        weight[...] = weight[...] * fade + weights.sum(axis=1, keepdims=True)
        total[...] = total[...] * fade + product(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))

    @pl.when(visit == visits - 1)
    def end() -> None:
        reads = weight[...] > 0
        sums = jnp.where(reads, weight[...], 1.0)
        lse[...] = jnp.where(reads, peak[...] + jnp.log(sums), UNSEEN)
        out[...] = (total[...] / sums).astype(out.dtype)


def _forward(
    q: Array, k: Array, v: Array, begin: Array, limit: Array, block_size: int, scale: float
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return _decode(q, k, v, begin, limit, block_size, scale), (q, k, v, begin, limit)


def _backward(block_size: int, scale: float, saved: tuple[Array, ...], cotangents: Any) -> tuple[Any, ...]:
    """That of the gathered form: few queries are trained seldom."""
    q, k, v, begin, limit = saved
    options: dict[str, Any] = {"block_size": block_size, "aligned": True, "scale": scale}
    _, pull = jax.vjp(lambda q, k, v: xla(q, k, v, begin, limit, **options), q, k, v)
    return (*pull(cotangents), None, None)


_decode.defvjp(_forward, _backward)
