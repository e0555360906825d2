"""What every mixer promises: a sequence fed whole, or in consecutive pieces, gives the same outputs."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

State = Any  # an explicit pytree of arrays


@struct.dataclass
class Tokens:
    """When and where each fed token is. Pieces may be cut between steps, never inside one.

    Attributes:
      step: [B or 1, T] int32: a token may read all remembered tokens of the same and of earlier steps.
      position: [B or 1, T, D] int32 coordinates; -1 for a token without a place.
      num_remembered: the first so many tokens enter the state; the others (queries) read it and leave no trace.
    """

    step: Array
    position: Array
    num_remembered: int = struct.field(pytree_node=False)


class Mixer(Protocol):
    """How tokens read one another.

    A mixer is a Linen module of fields `embed_dim`, `dtype`, `param_dtype` and its own. Its state is a pytree of arrays.
    """

    reads_peers: ClassVar[bool]  # tokens of one step read each other both ways, as masked models need

    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> State:
        """The state before the first token, for at most `max_len` remembered tokens, `max_step_len` of them a step."""

    def __call__(self, x: Array, tokens: Tokens, state: State | None = None) -> tuple[Array, State | None]:
        """Maps x [B, T, D] to [B, T, D] and, where a state is given, returns the state after these tokens."""


def time_order(tokens: Tokens) -> tuple[Array, Array, Array]:
    """The fed tokens sorted by step, for mixers that read a sequence from its start to its end.

    Returns:
      Three arrays [B or 1, T]: the permutation into time order, its inverse, and (in time order) which tokens are remembered.
    """
    forward = jnp.argsort(tokens.step, axis=1, stable=True)
    return forward, jnp.argsort(forward, axis=1), forward < tokens.num_remembered


def take(a: Array, index: Array) -> Array:
    """Rows of a [B, T, ...] by index [B or 1, T']."""
    if index.shape[0] == 1:
        return jnp.take(a, index[0], axis=1)
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(a, index)


def split_heads(x: Array, num_heads: int) -> Array:
    """[B, T, heads H] to [B, T, heads, H]."""
    return x.reshape(*x.shape[:2], num_heads, -1)


def merge_heads(x: Array) -> Array:
    """[B, T, heads, H] to [B, T, heads H]."""
    return x.reshape(*x.shape[:2], -1)
