"""Filters of a categorical distribution, applied in the order temperature, top-k, top-p, min-p."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.config import UsageError
from ar_jax.heads.noise import Noise
from ar_jax.heads.protocol import Sampling


def filtered(logits: Array, settings: Sampling) -> Array:
    """Logits [..., V] at the settings' temperature, -inf where a filter drops a token.

    The likeliest token always stays. Ties at the k-th place all stay. top_p keeps the token that crosses the threshold.
    """
    logits = logits / jnp.maximum(jnp.asarray(settings.temperature, logits.dtype), 1e-6)
    if settings.top_k is None and settings.top_p is None and settings.min_p is None:
        return logits
    vocab_size = logits.shape[-1]
    if settings.top_k is not None:
        allowed = jnp.clip(jnp.asarray(settings.top_k), 1, vocab_size)
        logits = jnp.where(logits >= _last_kept(logits, lambda kept: kept.sum(axis=-1) >= allowed), logits, -jnp.inf)
    if settings.top_p is not None:
        probability, most = jax.nn.softmax(logits, axis=-1), jnp.asarray(settings.top_p)

        def enough(kept: Array) -> Array:
            return jnp.where(kept, probability, 0).sum(axis=-1) >= most

        logits = jnp.where((logits >= _last_kept(logits, enough)) & (probability > 0), logits, -jnp.inf)
    if settings.min_p is not None:
        best = logits.max(axis=-1, keepdims=True)
        threshold = jnp.minimum(best + jnp.log(jnp.asarray(settings.min_p, logits.dtype)), best)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return logits


def _last_kept(logits: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest logit t, [..., 1], such that {logits >= t} is `enough`, or the lowest where nothing is.

    Bit by bit, on integers in the order of the floats: 32 passes over the logits instead of a sort, which takes CPUs ten
    times as long.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32) + 0.0, jnp.int32)  # + 0.0: -0.0 is 0.0
    bits = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)

    def refined(i: Array, lowest: Array) -> Array:
        higher = lowest + jax.lax.shift_left(jnp.int32(1), 31 - i)  # the first step, from the least, wraps round to 0
        return jnp.where(enough(bits >= higher)[..., None], higher, lowest)

    lowest = jnp.full((*logits.shape[:-1], 1), jnp.iinfo(jnp.int32).min)
    found = jnp.minimum(jax.lax.fori_loop(0, 32, refined, lowest), bits.max(axis=-1, keepdims=True))
    found = jnp.maximum(found, -jnp.int32(0x7F800001))  # of -inf; what is below is no number
    return jax.lax.bitcast_convert_type(jnp.where(found < 0, found ^ jnp.int32(2**31 - 1), found), jnp.float32)


def draw(noise: Noise, logits: Array, settings: Sampling) -> Array:
    """Tokens [...] int32 from logits [..., V] and the noise "token"; temperature 0 takes the likeliest."""
    drawn = noise.categorical("token", filtered(logits, settings))
    return jnp.where(jnp.asarray(settings.temperature) > 0, drawn, logits.argmax(axis=-1)).astype(jnp.int32)


def check_no_filters(settings: Sampling, head: str) -> None:
    """Raises UsageError where settings filter a vocabulary, which the tokens of this head do not have."""
    if not (settings.top_k is None and settings.top_p is None and settings.min_p is None):
        raise UsageError(f"top_k, top_p and min_p filter a vocabulary; head {head!r} takes a temperature only.")
