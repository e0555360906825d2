"""The algebra of a chunk that all chunked forms of the delta rules share."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def inverse(lower: Array) -> Array:
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


def sums_between(log_decay: Array) -> Array:
    """[..., C] -> [..., C, C]: the sum over j < i <= t, -inf where j > t.

    A difference of two sums from the chunk's start would lose, after a strong decay, the digits of the weak ones.
    """
    size = log_decay.shape[-1]
    after = jnp.tril(jnp.ones((size, size), bool), -1)  # [i, j]: i > j
    terms = jnp.where(after, log_decay[..., :, None], 0.0)
    causal = jnp.tril(jnp.ones((size, size), bool))
    return jnp.where(causal, jnp.cumsum(terms, axis=-2), -jnp.inf)


def decayed_products(reading: Array, writing: Array, log_decay: Array) -> tuple[Array, Array, Array]:
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
