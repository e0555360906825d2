"""Sums of log decays over parts of a chunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

NOTHING_LEFT = -104.0  # nats: exp of it, and of anything below, is zero in float32
COARSE = 16  # per nat: a sum of whole sixteenths is exact


def running_sums(log_decay: Array) -> tuple[Array, Array]:
    """Sums from the start of the last axis up to and including each token, in two parts that add up to them.

    What decays between two tokens is the difference of two sums. A single float32 would lose, after strong decays, the
    last digits of the weak ones: of -1000 nats only 1/16000 of a nat is kept. Here the first part counts whole sixteenths,
    exactly, and the second part's terms are smaller than those. Only the second part has a gradient.
    """
    coarse = jax.lax.stop_gradient(jnp.round(log_decay * COARSE) / COARSE)
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


def reading_and_writing(log_decay: Array, strict: bool) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The sums at which tokens read and those at which they write: from j to t decays what reading_t - writing_j says.

    Where reading is strict it comes before the token's own decay.
    """
    writing = running_sums(log_decay)
    if not strict:
        return writing, writing
    before = lambda x: jnp.pad(x[..., :-1], [(0, 0)] * (x.ndim - 1) + [(1, 0)])  # noqa: E731
    return (before(writing[0]), before(writing[1])), writing
