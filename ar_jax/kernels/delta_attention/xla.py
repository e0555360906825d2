"""The delta rules in chunks: what a chunk writes is the solution of one triangular system (arXiv:2406.06484, sec. 3).

With S the memory before the chunk and D_tj the decay from after token j up to and including token t, what the tokens of a
chunk write, R [C, E], and what they read, O [C, E], follow from

    R_t = beta_t (v_t - k_t^T S_decayed - sum_{j<t} D_tj (k_t . k_j) R_j),        (I + L) R = beta (V - K_decayed S)
    O_t = q_t^T S_decayed + sum_{j<=t} D_tj (q_t . k_j) R_j

and the memory after it is S_decayed + sum_j D_Cj k_j R_j^T. No exponent is positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 64
Chunk = Callable[[Array, tuple[Array, ...]], tuple[Array, Array]]


def delta(
    q: Array, k: Array, v: Array, beta: Array, *, log_decay: Array, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `delta_attention`."""
    return _over_chunks(_delta_chunk, (q, k, v, beta, log_decay), initial_state, chunk_size, v.dtype)


def dplr(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    *,
    log_decay: Array,
    initial_state: Array,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """See `dplr_attention`."""
    return _over_chunks(_dplr_chunk, (q, k, v, a, b, log_decay), initial_state, chunk_size, v.dtype)


def _delta_chunk(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk: q, k, v [B, N, C, ...], beta and log_decay [B, N, C]."""
    q, k, v, beta, log_decay = inputs
    between = _sums_between(log_decay)
    total = jnp.cumsum(log_decay, axis=-1)[..., None]  # [B, N, C, 1]
    from_start, to_end = jnp.exp(total), jnp.exp(between[..., -1, :, None])

    lower = beta[..., None] * jnp.tril(jnp.exp(between) * jnp.einsum("bnth,bnjh->bntj", k, k), -1)
    surprise = beta[..., None] * (v - from_start * jnp.einsum("bnth,bnhe->bnte", k, state))
    written = jnp.einsum("bntj,bnje->bnte", _inverse(lower), surprise)
    scores = jnp.exp(between) * jnp.einsum("bnth,bnjh->bntj", q, k)
    out = from_start * jnp.einsum("bnth,bnhe->bnte", q, state) + jnp.einsum("bntj,bnje->bnte", scores, written)
    state = from_start[..., -1:, :] * state + jnp.einsum("bnjh,bnje->bnhe", to_end * k, written)
    return state, out


def _dplr_chunk(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk: q, k, v, a, b, log_decay [B, N, C, ...]. What b writes is U = (I - M_ab)^-1 (A_decayed S + M_ak V).

    Both a and q read the memory before their own token, q through that token's decay; what the token itself writes q
    reads besides.
    """
    q, k, v, a, b, log_decay = inputs
    reading, writing = jnp.stack([a, q * jnp.exp(log_decay)]), jnp.stack([b, k])
    (earlier_a, earlier_q), before, after = _decayed_products(reading, writing, log_decay)
    own = jnp.einsum("bnth,wbnth->wbnt", q, writing)[..., None]
    read = jnp.einsum("rbnth,bnhe->rbnte", reading * jnp.exp(before)[None], state)
    moved = read[0] + jnp.einsum("bntj,bnje->bnte", earlier_a[1], v)
    moved = jnp.einsum("bntj,bnje->bnte", _inverse(-earlier_a[0]), moved)
    written = jnp.stack([moved, v])
    out = read[1] + jnp.einsum("wbntj,wbnje->bnte", earlier_q, written) + (own * written).sum(0)
    added = jnp.einsum("wbnjh,wbnje->bnhe", writing * jnp.exp(after)[None], written)
    return jnp.exp(before[..., -1, :] + log_decay[..., -1, :])[..., None] * state + added, out


def _inverse(lower: Array) -> Array:
    """(I + lower)^-1 for [..., C, C] that are zero on and above the diagonal; C is a power of two.

    Blocks of 1, 2, 4, ... tokens along the diagonal are inverted and joined in pairs: the corner of a joined block is
    -(later inverse) (corner) (earlier inverse). These are few products of many blocks; a triangular solve goes row by row.
    """
    *batch, size, _ = lower.shape
    found = jnp.ones((*batch, size, 1, 1), jnp.float32)
    block = 1
    while block < size:
        pairs = lower.reshape(*batch, size // block // 2, 2 * block, size // block // 2, 2 * block)
        corner = jnp.einsum("...nrnc->...nrc", pairs)[..., block:, :block]
        early, late = found[..., 0::2, :, :], found[..., 1::2, :, :]
        found = _joined(early, -(late @ corner @ early), late)
        block *= 2
    return found[..., 0, :, :]


def _joined(early: Array, corner: Array, late: Array) -> Array:
    """The lower triangular blocks [[early, 0], [corner, late]]."""
    upper = jnp.concatenate([early, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, late], axis=-1)], axis=-2)


def _sums_between(log_decay: Array) -> Array:
    """[..., C] -> [..., C, C]: the sum over j < i <= t, -inf where j > t.

    A difference of two sums from the chunk's start would lose, after a strong decay, the digits of the weak ones.
    """
    size = log_decay.shape[-1]
    after = jnp.tril(jnp.ones((size, size), bool), -1)  # [i, j]: i > j
    terms = jnp.where(after, log_decay[..., :, None], 0.0)
    causal = jnp.tril(jnp.ones((size, size), bool))
    return jnp.where(causal, jnp.cumsum(terms, axis=-2), -jnp.inf)


def _decayed_products(reading: Array, writing: Array, log_decay: Array) -> tuple[Array, Array, Array]:
    """Products of readers and writers of earlier tokens, under the decay of each channel between the two.

    Blocks of 1, 2, 4, ... tokens are joined in pairs: where a later block reads an earlier one, the decay from writer to
    reader is split at the border between the two, so that both factors are at most one.

    Args:
      reading: [R, B, N, C, H].
      writing: [W, B, N, C, H].
      log_decay: [B, N, C, H].

    Returns:
      The products [R, W, B, N, C, C], zero unless the reader comes after the writer, and the sums of log decays from the
      chunk's start up to before each token and from after each token to the chunk's end, [B, N, C, H].
    """
    blocks = lambda x: x[..., None, :]  # [..., C, H] -> [..., C blocks, 1, H]  # noqa: E731
    reading, writing, total = blocks(reading), blocks(writing), blocks(log_decay)
    before = after = jnp.zeros_like(total)  # within the block
    products = jnp.zeros((len(reading), len(writing), *total.shape[:-1], 1), jnp.float32)
    while total.shape[-3] > 1:
        early, late = (lambda x: x[..., 0::2, :, :]), (lambda x: x[..., 1::2, :, :])
        readers, writers = late(reading * jnp.exp(before)[None]), early(writing * jnp.exp(after)[None])
        across = jnp.einsum("r...ih,w...jh->rw...ij", readers, writers)
        products = _joined(early(products), across, late(products))
        before = jnp.concatenate([early(before), late(before) + early(total)], axis=-2)
        after = jnp.concatenate([early(after) + late(total), late(after)], axis=-2)
        reading, writing = (jnp.concatenate([early(x), late(x)], axis=-2) for x in (reading, writing))
        total = early(total) + late(total)
    return products[..., 0, :, :], before[..., 0, :, :], after[..., 0, :, :]


def _over_chunks(
    one_chunk: Chunk, arrays: tuple[Array, ...], initial_state: Array, chunk_size: int | None, dtype: Any
) -> tuple[Array, Array]:
    """Carries the memory through the chunks; backward keeps the memory before each chunk and computes the rest anew."""
    batch, length, heads = arrays[0].shape[:3]
    chunk = chunk_size or min(CHUNK, 1 << (length - 1).bit_length())

    def split(x: Array) -> Array:
        """[B, T, N, ...] -> [T / C, B, N, C, ...]; padding neither writes nor decays."""
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, -1, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    step = jax.checkpoint(one_chunk, prevent_cse=False)
    state, out = jax.lax.scan(step, initial_state, tuple(map(split, arrays)))
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1).reshape(batch, -1, heads, out.shape[-1])
    return out[:, :length].astype(dtype), state
