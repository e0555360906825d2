"""What every mixer promises: a sequence fed whole, or in consecutive pieces, gives the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

State = Any  # an explicit pytree of arrays
NEVER = 2**30  # the step of padding, and of empty places in a cache: later than all others, so that nobody reads them


@struct.dataclass
class Tokens:
    """When and where each fed token is. Pieces may be cut between steps, never inside one.

    Attributes:
      step: [B or 1, T] int32: a token may read all remembered tokens of the same and of earlier steps. Padding has step
        NEVER: no other token reads it.
      position: [B or 1, T, D] int32 coordinates; -1 for a token without a place.
      num_remembered: the first so many tokens enter the state; the others (queries) read it and leave no trace.
      row: [B or 1, T] int32, the token's row in a table of all places: the prefix tokens, then the slots; None where no
        model asks.
      blank: [B or 1, T] bool, tokens that carry no value; None where there are none.
      num_known: the tokens behind the first so many are all blank; None where that is not known.
      padded: some tokens may be padding.
      segment: [B or 1, T] int32, which of several sequences, packed behind one another, a token belongs to: tokens of
        different segments do not read each other. None where there is one.
      num_readable: a state holds at most so many tokens after these; None where that is not known.
      asked: [B or 1, T] bool, tokens whose outputs are asked for; None where all are, or no model asks.
      num_asked: how many these are in each example.
      features: [B or 1, T, F] float32, what is known of the tokens from outside, such as a lexicon's entries; None where no
        model asks.
      near: the sides of a patch and a number of patches along each axis: tokens that are farther apart do not read one
        another. None where distance does not matter.
      at: [1, num_remembered] int32, where in the state each is put; None puts each behind the last.
    """

    step: Array
    position: Array
    num_remembered: int = struct.field(pytree_node=False)
    row: Array | None = None
    blank: Array | None = None
    num_known: int | None = struct.field(pytree_node=False, default=None)
    padded: bool = struct.field(pytree_node=False, default=False)
    num_readable: int | None = struct.field(pytree_node=False, default=None)
    segment: Array | None = None
    asked: Array | None = None
    num_asked: int | None = struct.field(pytree_node=False, default=None)
    features: Array | None = None
    near: tuple[tuple[int, ...], tuple[int, ...]] | None = struct.field(pytree_node=False, default=None)
    at: Array | None = None

    def part(self, piece: slice) -> Tokens:
        """The tokens of a piece [start:stop] of the sequence."""
        start, stop, _ = piece.indices(self.position.shape[1])
        cut = jax.tree.map(lambda a: a[:, piece], self)
        return cut.replace(
            num_remembered=min(max(self.num_remembered - start, 0), stop - start),
            num_known=None if self.num_known is None else min(max(self.num_known - start, 0), stop - start),
        )


@struct.dataclass
class Carried:
    """A mixer's state together with what the layers of its kind hand on, each to the next.

    Attributes:
      state: as without it, None for a whole sequence.
      shared: of these tokens, a pytree of arrays of the same shapes in all layers.
    """

    state: State | None
    shared: Any


class Mixer(Protocol):
    """How tokens read one another.

    A mixer is a Linen module of fields `embed_dim`, `dtype`, `param_dtype` and its own; those of the names `position_axes`
    (axes of a position), `grid` (a bound of the coordinates of each), `num_rows` (of the table of all places, see
    Tokens.row), `num_prefix` (the first of them, which have no place) and `reads_near` (Tokens.near will be told, which
    only mixers with this field serve) are filled in, too. Its state is a pytree of arrays.

    One whose layers have something in common also has a method `init_shared(batch_size, length)`, what its first layer is
    handed (None for nothing after all). Then it takes, and returns, a `Carried` in place of its state.
    """

    reads_peers: ClassVar[bool]  # tokens of one step read each other both ways, as masked models need

    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> State:
        """The state before the first token, for at most `max_len` remembered tokens, `max_step_len` of them a step."""

    def __call__(self, x: Array, tokens: Tokens, state: State | None = None) -> tuple[Array, State | None]:
        """Maps x [B, T, D] to [B, T, D] and, where a state is given, returns the state after these tokens."""


def in_time_order(mix: Callable[..., tuple[Array, State]], x: Any, tokens: Tokens, state: State) -> tuple[Array, State]:
    """Applies a mixer that reads a sequence from its start to its end; tokens of one step come in the order they are fed.

    Args:
      mix: (x, writes, starts, state) to [B, T, ...] and the state after. `writes` [B or 1, T] bool are the tokens
        that leave a trace (not the queries, nor padding), `starts` those that begin a segment and read nothing from before;
        None where all do, or none does.
      x: [B, T, D] as fed, or several such arrays.
      tokens: when they are.
      state: passed on to mix.
    """
    some_leave_no_trace = tokens.num_remembered < jax.tree.leaves(x)[0].shape[1] or tokens.padded
    if not some_leave_no_trace:
        return mix(x, None, None if tokens.segment is None else segment_starts(tokens.segment), state)
    forward, backward, remembered = time_order(tokens)
    segment = None if tokens.segment is None else take(tokens.segment, forward)
    ordered = jax.tree.map(lambda a: take(a, forward), x)
    out, state = mix(ordered, remembered, None if segment is None else segment_starts(segment), state)
    return take(out, backward), state


def segment_starts(segment: Array) -> Array:
    """Which tokens are of another segment than the one before them, [B or 1, T] bool; the first one goes on with a state."""
    return jnp.concatenate([jnp.zeros_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1)


def time_order(tokens: Tokens) -> tuple[Array, Array, Array]:
    """The fed tokens sorted by step, for mixers that read a sequence from its start to its end.

    Returns:
      Three arrays [B or 1, T]: the permutation into time order, its inverse, and (in time order) which tokens are remembered:
      not the queries, nor padding.
    """
    forward = jnp.argsort(tokens.step, axis=1, stable=True)
    if tokens.segment is not None:  # one segment after the other
        forward = jnp.take_along_axis(forward, jnp.argsort(take(tokens.segment, forward), axis=1, stable=True), axis=1)
    remembered = (forward < tokens.num_remembered) & (jnp.take_along_axis(tokens.step, forward, axis=1) < NEVER)
    return forward, jnp.argsort(forward, axis=1), remembered


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
