"""Filters of a categorical distribution, applied in the order temperature, top-k, top-p, min-p."""

from __future__ import annotations

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
        descending = -jnp.sort(-logits, axis=-1)
        last = jnp.clip(jnp.asarray(settings.top_k) - 1, 0, vocab_size - 1)
        logits = jnp.where(logits >= jnp.take(descending, last, axis=-1)[..., None], logits, -jnp.inf)
    if settings.top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        lowest = jnp.where((before < settings.top_p) & (probability > 0), descending, jnp.inf).min(
            axis=-1, keepdims=True
        )
        logits = jnp.where(logits >= jnp.minimum(lowest, descending[..., :1]), logits, -jnp.inf)
    if settings.min_p is not None:
        best = logits.max(axis=-1, keepdims=True)
        threshold = jnp.minimum(best + jnp.log(jnp.asarray(settings.min_p, logits.dtype)), best)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return logits


def draw(noise: Noise, logits: Array, settings: Sampling) -> Array:
    """Tokens [...] int32 from logits [..., V] and the noise "token"; temperature 0 takes the likeliest."""
    drawn = (filtered(logits, settings) + noise.gumbel("token", logits.shape)).argmax(axis=-1)
    return jnp.where(jnp.asarray(settings.temperature) > 0, drawn, logits.argmax(axis=-1)).astype(jnp.int32)


def check_no_filters(settings: Sampling, head: str) -> None:
    """Raises UsageError where settings filter a vocabulary, which the tokens of this head do not have."""
    if not (settings.top_k is None and settings.top_p is None and settings.min_p is None):
        raise UsageError(f"top_k, top_p and min_p filter a vocabulary; head {head!r} takes a temperature only.")
