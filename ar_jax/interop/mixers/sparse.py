"""Official runs of sparse and distributed softmax attention: operations on queries, keys and values without weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs
from ar_jax.interop.mixers.torch_top_k import torch_top_k
from ar_jax.kernels.multiresolution import CERTAIN, PRIOR, multiresolution
from ar_jax.kernels.native_sparse import Blocks, block_means, native_sparse
from ar_jax.kernels.ranked_attention import ranked_attention
from ar_jax.kernels.sparsek import sparsek
from ar_jax.kernels.step_attention import merge, step_attention, visibility
from ar_jax.kernels.step_attention.key_bias import forgotten, key_biased


def replay_forgetting(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Softmax attention with forget gates, over all of the past and within a window."""
    q, k, v, log_forget = (jnp.asarray(inputs[f"in.{name}"]) for name in "qkvg")
    step = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    key_bias = -forgotten(log_forget, step)
    out, near = (
        key_biased(step_attention, q, k, v, step, step, key_bias=key_bias, scale=meta["config"].get("scale"), window=w)
        for w in (None, meta["config"].get("window"))
    )
    return {"out.o": out, "out.o_window": near}


def replay_tree(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """One query's attention to each of eight parts of the keys, and what they are together; logits are not scaled."""
    q, k, v = (jnp.asarray(inputs[f"in.{name}"]) for name in "qkv")
    parts = meta["outputs"]["out.partial_lse"]["shape"][0]
    zeros = jnp.zeros(q.shape[1], jnp.int32), jnp.zeros(k.shape[1] // parts, jnp.int32)
    read = [
        step_attention(q, *part, *zeros, scale=1.0, return_lse=True)
        for part in zip(jnp.split(k, parts, axis=1), jnp.split(v, parts, axis=1), strict=True)
    ]
    outs, lses = (jnp.stack(kind) for kind in zip(*read, strict=True))
    out, lse = merge(outs, lses)
    return {
        "out.y": out,
        "out.lse": jnp.swapaxes(lse, 1, 2),
        "out.partial_res": outs,
        "out.partial_lse": jnp.swapaxes(lses, 2, 3),
    }


def replay_native_sparse(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The three branches of native sparse attention, their gated sum, and it without the window."""
    config = meta["config"]
    q, k, v, *gates = (jnp.asarray(inputs[f"in.{name}"]) for name in ("q", "k", "v", "g_cmp", "g_slc", "g_swa"))
    size, count = config["block_size"], config["S"]
    scale = config.get("scale") or q.shape[-1] ** -0.5
    begin = jnp.arange(0, k.shape[1], size, dtype=jnp.int32)[None]
    blocks = Blocks(block_means(k, size), block_means(v, size), begin)
    step = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    options = {"block_size": size, "scale": scale}
    first = jnp.zeros_like(step)
    compressed, lse, _, selected = native_sparse(q, k, v, blocks, first, step + 1, num_blocks=count, **options)
    near = step_attention(q, k, v, step, step, window=config["window_size"], scale=scale)
    sums = [gate[..., None] * out for gate, out in zip(gates, (compressed, selected, near), strict=True)]
    blocks_read = _chosen_by_torch(q, blocks.k, lse, size, count, scale)
    return {
        "out.o_cmp": compressed,
        "out.lse_cmp": jnp.where(lse > -1e29, lse, -1e9),
        "out.block_indices": blocks_read,
        "out.block_indices_sorted": np.sort(blocks_read, axis=-1),
        "out.o_slc": selected,
        "out.o": sum(sums),
        "out.o_no_window": sums[0] + sums[1],
    }


def _chosen_by_torch(q: Any, keys: Any, lse: Any, size: int, count: int, scale: float) -> np.ndarray:
    """The selected blocks in the official order: blocks that are always read have the score 1, and ties PyTorch's order."""
    (batch, length, heads, _), shared = q.shape, keys.shape[2]
    grouped = q.reshape(batch, length, shared, heads // shared, -1)
    logits = np.asarray(jnp.einsum("btkgh,bmkh->btkgm", grouped, keys) * scale)
    query, block = np.arange(length)[:, None], np.arange(keys.shape[1])[None]
    ended = (block + 1) * size - 1 <= query
    forced = (block == 0) | (block == query // size) | (block == query // size - 1)
    share = np.exp(
        np.where(ended[:, None, None], logits - np.asarray(lse).reshape(*grouped.shape[:-1])[..., None], -np.inf)
    )
    score = np.where(forced[:, None], 1, share.mean(axis=3))
    kept = min(count, keys.shape[1])
    chosen = torch_top_k(score.astype(np.float32), kept)
    allowed = np.take_along_axis(np.broadcast_to((ended | forced)[:, None], score.shape), chosen, axis=-1)
    return np.pad(np.where(allowed, chosen, -1), ((0, 0),) * 3 + ((0, count - kept),), constant_values=-1)


def replay_sparsek(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The projection, of whole vectors and of their prefixes, its threshold and its derivatives."""
    z, k = jnp.asarray(inputs["in.z"]), meta["config"]["k"]
    share, threshold = sparsek(z, k)
    prefixes = jnp.tril(jnp.ones((z.shape[1],) * 2, bool))[None]
    causal, _ = sparsek(jnp.broadcast_to(z[:, None], (*z.shape, z.shape[1])), k, prefixes)
    slope = jax.vmap(jax.jacobian(lambda row: sparsek(row, k)[0]))(z)
    return {"out.p": share, "out.tau": threshold, "out.p_causal": causal, "out.jacobian": slope}


def replay_multiresolution(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Attention at two resolutions in both modes, with and without padding, and with all pairs of blocks exact."""
    config = meta["config"]
    q, k, v = (jnp.swapaxes(jnp.asarray(inputs[f"in.{name}"]), 1, 2) for name in "qkv")
    present = jnp.asarray(inputs["in.mask"]) > 0
    size = config.get("block_size", 32)
    options = {"block_size": size, "first_blocks": config["first_n"], "diagonal_blocks": config["diag_n"]}

    def attend(present: Any, num_blocks: int, mode: str) -> Any:
        pairs = _pairs_by_torch(q, k, present, num_blocks, size, config["first_n"], config["diag_n"])
        out = multiresolution(q, k, v, present, num_blocks=num_blocks, mode=mode, pairs=pairs, **options)
        return jnp.swapaxes(out, 1, 2)

    count = config["num_blocks"]
    return {
        "out.y_full": attend(present, count, "full"),
        "out.y_full_nomask": attend(None, count, "full"),
        "out.y_sparse": attend(present, count, "sparse"),
        "out.y_sparse_nomask": attend(None, count, "sparse"),
        "out.y_exact_budget": attend(None, (q.shape[1] // size) ** 2, "full"),
    }


def _pairs_by_torch(q: Any, k: Any, present: Any, count: int, size: int, first: int, diagonal: int) -> tuple[Any, Any]:
    """The exact pairs of blocks in the official order: the largest logits of rows tie, at 0, and PyTorch's order decides.

    As published, those that tie with the last one chosen are not approximated either.
    """
    (batch, length, heads, width), blocks = q.shape, q.shape[1] // size
    there = np.ones((batch, length), np.float32) if present is None else np.asarray(present, np.float32)
    there = np.broadcast_to(there, (batch, length)).reshape(batch, blocks, size)
    tokens = there.sum(axis=2)

    def means(x: Any) -> np.ndarray:
        summed = np.einsum("bmsnh,bms->bnmh", np.asarray(x).reshape(batch, blocks, size, heads, width), there)
        return summed / np.maximum(tokens, 1)[:, None, :, None]

    coarse = means(q) @ means(k).swapaxes(2, 3) * np.float32(width**-0.5)
    empty = (tokens[:, :, None] * tokens[:, None] == 0)[:, None]
    number = np.arange(blocks)
    near = np.abs(number[:, None] - number[None]) <= diagonal // 2
    prior = near * (diagonal > 0) + (number < first)[:, None] * 1 + (number < first)[None]
    score = coarse - np.float32(CERTAIN) * empty - coarse.max(axis=-1, keepdims=True)
    score = (score + np.float32(PRIOR) * prior).astype(np.float32).reshape(batch, heads, -1)
    chosen = torch_top_k(score, count)
    least = np.take_along_axis(score, chosen, axis=-1).min(axis=-1, keepdims=True)
    return jnp.asarray(chosen, jnp.int32), jnp.asarray((score < least).reshape(coarse.shape))


def replay_loki(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Attention to the keys of the largest scores in few components; which those are; and their share of the scores."""
    config = meta["config"]
    q, k, v = (jnp.swapaxes(jnp.asarray(inputs[f"in.{name}"]), 1, 2) for name in "qkv")
    components = jnp.asarray(inputs["in.pca"])
    q, k = (jnp.einsum("bthc,hrc->bthr", a, components) for a in (q, k))
    length, rank, count = k.shape[1], config["top_r"], config["top_k"]
    step = jnp.arange(length, dtype=jnp.int32)[None]
    visible = visibility(step, step)
    out = ranked_attention(q, k, v, visible, rank=rank, num_keys=count)
    scores = np.asarray(jnp.einsum("bthr,bshr->bhts", q[..., :rank], k[..., :rank]) * q.shape[-1] ** -0.5)
    scores = scores + np.triu(np.full((length, length), np.finfo(np.float32).min), 1).astype(np.float32)
    kept = np.zeros(scores.shape, np.int64)
    np.put_along_axis(kept, torch_top_k(scores, min(count, length)), 1, axis=-1)
    share = (np.asarray(jax.nn.softmax(scores, axis=-1)) * kept).sum(axis=-1, keepdims=True)
    out = jnp.swapaxes(out, 1, 2)
    return {"out.y": out, "out.alpha": share, "out.y_last": out[:, :, -1:], "out.kept": kept}
