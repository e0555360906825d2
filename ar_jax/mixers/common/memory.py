"""What recurrent mixers have in common: what they remember, and where that fades or time stands still."""

from __future__ import annotations

from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

FORGOTTEN = -100.0  # nats: nothing is left of what decays by so much; more would cost the sums their last digits


@struct.dataclass
class Remembered:
    """What a recurrent mixer remembers, whatever the length; both None for a whole sequence.

    Attributes:
      recent: the last values that a short convolution or shift reaches, a Ring; None without one.
      memory: float32, of the recurrence.
    """

    recent: Any = None
    memory: Any = None


@overload
def fading(log_decay: Array, writes: Array | None, starts: Array | None, shape: tuple[int, ...] = ()) -> Array: ...


@overload
def fading(
    log_decay: Array | None, writes: Array | None, starts: Array | None, shape: tuple[int, ...] = ()
) -> Array | None: ...


def fading(
    log_decay: Array | None, writes: Array | None, starts: Array | None, shape: tuple[int, ...] = ()
) -> Array | None:
    """Log decays for `in_time_order`: none for tokens that write nothing, since time stands still for them, all at a start.

    Args:
      log_decay: [B or 1, T, ...] nats per token; None does not decay.
      writes: see `in_time_order`.
      starts: see `in_time_order`: what was before fades at once.
      shape: of the result where a segment starts and nothing decays otherwise.

    Returns:
      [B, T, ...], or None where nothing fades.
    """
    if log_decay is None:
        if starts is None:
            return None
        log_decay = jnp.zeros(shape)
    if writes is not None:
        log_decay = jnp.where(like(writes, log_decay), log_decay, 0)
    return log_decay if starts is None else jnp.where(like(starts, log_decay), FORGOTTEN, log_decay)


def like(which: Array, a: Array) -> Array:
    """[B or 1, T] with axes of size 1 behind, as many axes as a has."""
    return which.reshape(*which.shape, *(1,) * (a.ndim - 2))


def with_floor(log_decay: Array, floor: float) -> Array:
    """The logarithm of floor + (1 - floor) exp(log_decay), for 0 <= floor < 1."""
    return jnp.logaddexp(np.log(floor), np.log1p(-floor) + log_decay) if floor else log_decay
