"""Step attention block by block (arXiv:2205.14135), on every platform: no more than one block of logits at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.dispatch import platform
from ar_jax.kernels.step_attention.gradient import backward_of, differentiable
from ar_jax.kernels.step_attention.reference import reference
from ar_jax.kernels.step_attention.visibility import EMPTY, UNSEEN, Visibility

FEW_QUERIES = 8  # and few logits: one product for all examples has the least overhead
FEW_LOGITS = 128 * 128
LARGEST_BLOCK = 256  # queries, and keys: a block's logits stay in a core's cache


def xla(
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: Array | None,
    sinks: Array | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array]:
    """See `step_attention`. Cost: O(T S) FLOPs less the blocks in which nothing is seen, O(T + S) memory without a bias."""
    dense = functools.partial(reference, scale=scale, soft_cap=soft_cap)
    if _few(q, k):
        return dense(q, k, v, visible, bias, sinks)
    if bias is not None:  # which is as large as the logits of an example
        return _each_example(jax.checkpoint(dense), q, k, v, visible, bias, sinks)
    return _blocked(q, k, v, visible, None, sinks, scale=scale, soft_cap=soft_cap)


def backward(
    q: Array, k: Array, v: Array, visible: Visibility, bias: Array | None, *rest: Array, **options: Any
) -> tuple[Array, Array, Array, Array | None]:
    """See `differentiable`."""
    if bias is not None or _few(q, k):
        return backward_of(xla)(q, k, v, visible, bias, *rest, **options)
    return _backward(q, k, v, visible, None, *rest, **options)


def _few(q: Array, k: Array) -> bool:
    return q.shape[1] <= FEW_QUERIES or q.shape[1] * k.shape[1] <= FEW_LOGITS


def _forward(
    q: Array, k: Array, v: Array, visible: Visibility, bias: None, sinks: Array | None, **options: Any
) -> tuple[Array, Array]:
    return _each_example(functools.partial(_forward_one, **options), q, k, v, visible, None, sinks)


def _each_example(
    form: Any, q: Array, k: Array, v: Array, visible: Visibility, bias: Array | None, *shared: Any
) -> Any:
    """form of one example after the other on CPUs, where all together leave the cache; of all at once elsewhere.

    What the examples share is not mapped over: elsewhere a block that none of them sees is left out.
    """
    batch = len(q)
    own: dict[str, Any] = {"q": q, "k": k, "v": v}
    common: dict[str, Any] = {}
    given: dict[str, Any] = {"visible": visible, "bias": bias}
    for name, tree in given.items():
        if tree is not None:
            (own if len(jax.tree.leaves(tree)[0]) == batch > 1 else common)[name] = tree

    def one(mine: dict[str, Any]) -> Any:
        mine = jax.tree.map(lambda a: a[None], mine) | common
        out = form(mine["q"], mine["k"], mine["v"], mine["visible"], mine.get("bias"), *shared)
        return jax.tree.map(lambda a: a[0], out)

    return jax.lax.map(one, own) if platform() == "cpu" else jax.vmap(one)(own)


def _split(a: Array, size: int, heads: int) -> Array:
    """[T, N, ...] -> [T / size, heads, N / heads size, ...]: blocks of queries or keys, those that share a key head together."""
    a = jnp.pad(a, [(0, -len(a) % size)] + [(0, 0)] * (a.ndim - 1))
    a = a.reshape(-1, size, heads, a.shape[1] // heads, *a.shape[2:])
    return jnp.moveaxis(a, 1, 3).reshape(len(a), heads, -1, *a.shape[4:])


def _join(a: Array, size: int, length: int) -> Array:
    """Undoes _split."""
    blocks, heads = a.shape[:2]
    a = jnp.moveaxis(a.reshape(blocks, heads, -1, size, *a.shape[3:]), 3, 1)
    return a.reshape(blocks * size, -1, *a.shape[4:])[:length]


def _block(length: int) -> int:
    """The size of blocks, such that the last one is nearly full."""
    count = -(-length // LARGEST_BLOCK)
    return -(-length // (8 * count)) * 8


def _blocks_of(visible: Visibility, bq: int, bk: int) -> tuple[Array, Any]:
    """The kind of each block [T / bq, S / bk], and a function of two block numbers: which of its keys are seen, [bq, bk]."""
    visible = visible.padded(
        visible.upper.shape[2] + -visible.upper.shape[2] % bq, visible.key.shape[2] + -visible.key.shape[2] % bk
    )

    def seen(i: Array, j: Array) -> Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=2)
        rows = cut(visible.lower, i * bq, bq), cut(visible.upper, i * bq, bq), cut(visible.key, j * bk, bk)
        part = Visibility(*rows, visible.has_lower)
        return part.dense()[0]

    return visible.blocks(bq, bk)[0], seen


def _logits(q: Array, k: Array, seen: Array, scale: float, soft_cap: float | None) -> tuple[Array, Array]:
    """Of a block, [K, G bq, bk] float32; and the slope of the soft cap."""
    logits = jnp.einsum("kth,ksh->kts", q, k, preferred_element_type=jnp.float32) * scale
    slope = jnp.ones((), jnp.float32)
    if soft_cap is not None:
        bent = jnp.tanh(logits / soft_cap)
        logits, slope = soft_cap * bent, 1 - bent * bent
    seen = jnp.tile(seen, (logits.shape[1] // len(seen), 1))[None]
    return jnp.where(seen, logits, UNSEEN), slope


def _forward_one(
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: None,
    sinks: Array | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array]:
    (num_queries, heads, _), (num_keys, shared, _) = q.shape[1:], k.shape[1:]
    bq, bk = _block(num_queries), _block(num_keys)
    kinds, seen = _blocks_of(visible, bq, bk)
    keys, values = _split(k[0], bk, shared), _split(v[0], bk, shared)
    start = (
        jnp.full((shared, heads // shared), UNSEEN) if sinks is None else sinks.astype(jnp.float32).reshape(shared, -1)
    )
    start = jnp.repeat(start, bq, axis=1)[..., None]  # the sink is a first logit, without a value

    def query_block(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        i, queries = inputs

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            def read() -> tuple[Array, Array, Array]:
                out, peak, total = carry
                logits, _ = _logits(queries, keys[j], seen(i, j), scale, soft_cap)
                higher = jnp.maximum(peak, logits.max(axis=-1, keepdims=True))
                weights = jnp.where(logits > UNSEEN / 2, jnp.exp(logits - higher), 0.0)
                fade = jnp.exp(peak - higher)
                added = jnp.einsum(
                    "kts,ksh->kth", weights.astype(v.dtype), values[j], preferred_element_type=jnp.float32
                )
                return out * fade + added, higher, total * fade + weights.sum(axis=-1, keepdims=True)

            return jax.lax.cond(kinds[i, j] == EMPTY, lambda: carry, read)

        zero = jnp.zeros((*queries.shape[:-1], v.shape[-1]), jnp.float32)
        begin = zero, start, jnp.zeros_like(start) + (sinks is not None)
        out, peak, total = jax.lax.fori_loop(0, len(keys), key_block, begin)
        reads = total > 0
        total = jnp.where(reads, total, 1.0)
        return (out / total).astype(v.dtype), jnp.where(reads, peak + jnp.log(total), UNSEEN)

    queries = _split(q[0], bq, shared)
    out, lse = jax.lax.map(query_block, (jnp.arange(len(queries)), queries))
    return _join(out, bq, num_queries)[None], _join(lse, bq, num_queries)[None, ..., 0]


def _backward(
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: None,
    lse: Array,
    d_out: Array,
    delta: Array,
    **options: Any,
) -> tuple[Array, Array, Array, None]:
    own = {"q": q, "k": k, "v": v, "lse": lse, "d_out": d_out, "delta": delta}
    shared = len(visible.key) == 1

    def example(mine: Any) -> Any:
        arrays, sight = mine
        return _backward_one(**arrays, visible=visible if shared else jax.tree.map(lambda a: a[None], sight), **options)

    mapped = (own, None if shared else visible)
    grads = jax.lax.map(example, mapped) if platform() == "cpu" else jax.vmap(example)(mapped)
    return *grads, None


def _backward_one(
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    d_out: Array,
    delta: Array,
    visible: Visibility,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array, Array]:
    num_queries, num_keys, shared = len(q), len(k), k.shape[1]
    bq, bk = _block(num_queries), _block(num_keys)
    kinds, seen = _blocks_of(visible, bq, bk)
    keys, values = _split(k, bk, shared), _split(v, bk, shared)

    def query_block(sums: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        i, queries, lse_i, d_out_i, delta_i = inputs

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            def read() -> tuple[Array, Array, Array]:
                dq, dk, dv = carry
                logits, slope = _logits(queries, keys[j], seen(i, j), scale, soft_cap)
                weights = jnp.where(logits > UNSEEN / 2, jnp.exp(logits - lse_i), 0.0)
                product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
                d_weights = product("kth,ksh->kts", d_out_i, values[j])
                d_logits = (weights * (d_weights - delta_i) * slope * scale).astype(q.dtype)
                dq += product("kts,ksh->kth", d_logits, keys[j])
                dk = dk.at[j].add(product("kts,kth->ksh", d_logits, queries))
                dv = dv.at[j].add(product("kts,kth->ksh", weights.astype(v.dtype), d_out_i))
                return dq, dk, dv

            return jax.lax.cond(kinds[i, j] == EMPTY, lambda: carry, read)

        dq, *sums_after = jax.lax.fori_loop(0, len(keys), key_block, (jnp.zeros(queries.shape, jnp.float32), *sums))
        return tuple(sums_after), dq

    rows = [_split(a, bq, shared) for a in (q, lse[..., None], d_out, delta[..., None])]
    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(query_block, zeros, (jnp.arange(len(rows[0])), *rows))
    return (
        _join(dq, bq, num_queries).astype(q.dtype),
        _join(dk, bk, num_keys).astype(k.dtype),
        _join(dv, bk, num_keys).astype(v.dtype),
    )


_blocked = differentiable(_forward, _backward)
