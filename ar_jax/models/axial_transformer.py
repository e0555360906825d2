"""Axial Transformer (S020, arXiv:1912.12180): what past slices tell is computed once a slice, then a line's tokens one by one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import NEVER, State, Tokens, take, time_order
from ar_jax.models.blocks import Block, BlockOptions, MakeMixer


@struct.dataclass
class Slice:
    """What is remembered of one level: the slice that is being filled, and those before it.

    Attributes:
      filling: [B, P, D], what the outer blocks will read of the slice that is being filled.
      context: [B, P, D], what all slices before it tell each of its places.
      columns: the states of the outer mixers from slice to slice, B P sequences each.
    """

    filling: Array
    context: Array
    columns: State


@struct.dataclass
class Lines:
    """What is remembered.

    Attributes:
      count: int32 scalar, how many tokens have come.
      position: [B, P, axes] int32, of the tokens of the largest slice that is being filled.
      slices: of each level, the largest first.
      inner: the states of the inner mixers, for the tokens of this line.
    """

    count: Array
    position: Array
    slices: tuple[Slice, ...]
    inner: State


class Outer(nn.Module):
    """u = norm(blocks(slices)): along each axis inside a slice both ways, then from the first slice to its own.

    Attributes:
      shape: of a slice, P places.
      num_layers: how often.
    """

    make_mixer: MakeMixer
    options: BlockOptions
    shape: tuple[int, ...]
    num_layers: int

    def setup(self) -> None:
        """A block for each axis, a projection of what is told."""
        block = functools.partial(Block, self.make_mixer, self.options)
        self.inside = [[block() for _ in self.shape] for _ in range(self.num_layers)]
        self.columns = [block() for _ in range(self.num_layers)]
        self.norm = self.options.make_norm()()

    def __call__(self, slices: Array, position: Array, deterministic: bool) -> Array:
        """Slices [B, A, P, D] at [B, A, P, axes] to what each of them, and those before it, tell each of the P places."""
        batch, count, places, dim = slices.shape
        step = jnp.arange(count, dtype=jnp.int32)[None]
        down = Tokens(step, jnp.swapaxes(position, 1, 2).reshape(batch * places, count, -1), count)
        for inside, columns in zip(self.inside, self.columns, strict=True):
            flat = self._both_ways(
                inside, slices.reshape(-1, places, dim), position.reshape(-1, places, position.shape[3]), deterministic
            )
            turned = jnp.swapaxes(flat.reshape(slices.shape), 1, 2).reshape(-1, count, dim)
            turned = columns(turned, down, None, None, deterministic)[0]
            slices = jnp.swapaxes(turned.reshape(batch, places, count, dim), 1, 2)
        return self.norm(slices)

    def next(self, filled: Array, position: Array, number: Array, columns: State) -> tuple[Array, State]:
        """A slice [B, P, D], the number-th, to what it and those before it tell, [B, P, D], and the states after it."""
        batch, places, dim = filled.shape
        down = Tokens(number[None, None], position.reshape(batch * places, 1, -1), 1)
        after = []
        for inside, column, before in zip(self.inside, self.columns, columns, strict=True):
            filled = self._both_ways(inside, filled, position, True)
            turned, new = column(filled.reshape(-1, 1, dim), down, None, before, True)
            filled = turned.reshape(batch, places, dim)
            after.append(new)
        return self.norm(filled), tuple(after)

    def _both_ways(self, blocks: Sequence[Block], x: Array, position: Array, deterministic: bool) -> Array:
        """Slices [B, P, D], the tokens of each line of theirs reading one another, axis by axis from the last."""
        for axis in reversed(range(len(self.shape))):
            lines, back = _lines(x, self.shape, axis)
            places, _ = _lines(position, self.shape, axis)
            along = Tokens(jnp.zeros((1, self.shape[axis]), jnp.int32), places, self.shape[axis])
            x = back(blocks[axis](lines, along, None, None, deterministic)[0])
        return x


def _lines(a: Array, shape: tuple[int, ...], axis: int) -> tuple[Array, Any]:
    """Places [B, P, ...] as lines along an axis of the slice, [B P / length, length, ...], and the way back."""
    cells = jnp.moveaxis(a.reshape(len(a), *shape, a.shape[2]), axis + 1, -2)

    def back(lines: Array) -> Array:
        return jnp.moveaxis(lines.reshape(*cells.shape[:-1], lines.shape[-1]), -2, axis + 1).reshape(*a.shape[:2], -1)

    return cells.reshape(-1, *cells.shape[-2:]), back


class AxialTransformer(nn.Module):
    """Tokens, in the order of their generation, fill slices, which are filled line by line; see `Backbone`.

    outer, level by level: u^l = blocks(slices of y^l), inside each slice in both directions along each of its axes, then
      from the first slice to its own;  y^{l+1}_t = y^l_t + W_l u^l_{the slice before t's, t's place in it},  y^0 = x
    inner: h_t = blocks(y_t), along the line, from its first token to its own

    The slices of one level are those of the level before it, cut along their first axis: frames, then the rows of a frame;
    the last are lines. A token sees all of its past: its line through the inner blocks, the lines before it in its frame
    through the last level, the frames before it through the first. In raster order of a picture there is one level, whose
    slices are rows; with several channels, or frames, there are more. While sampling, the outer blocks of a level run when
    a slice is full, once for all the places of the next; a token costs the inner blocks alone.

    Attributes:
      num_layers: inner blocks.
      outer_layers: of each level; each has a block for every axis of its slices and one from slice to slice.
      slice_shape: sizes of all axes but the first, such as (H, W) for videos; () takes the side of a square image.
    """

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions
    num_rows: int
    num_prefix: int
    position_axes: int
    num_layers: int = 2
    outer_layers: int = 1
    slice_shape: Sequence[int] = ()

    reads_blanks: ClassVar[bool] = True

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the slices of each level."""
        whole = tuple(self.slice_shape) or (math.isqrt(self.num_rows - self.num_prefix),)
        return [whole[level:] for level in range(len(whole))]

    @nn.nowrap
    def check(self) -> None:
        """Raises UsageError for mixers, conditions or sizes that lines do not have."""
        mixer: Any = self.mixers[0]()
        if len(self.mixers) > 1 or not (mixer.reads_peers and mixer.causal):
            raise UsageError(
                "config.model.kind='axial_transformer' needs one mixer that reads both ways inside a step, such as 'softmax'."
            )
        if self.num_prefix > 1 or self.options.adaln != "none":
            raise UsageError(
                "config.model.kind='axial_transformer' takes a condition of one token and no adaLN; "
                "choose such a config.condition.kind, and config.model.adaln='none'."
            )
        if self.num_layers < 1 or self.outer_layers < 1 or min(self.shapes[0]) < 1 or self.shapes[-1][0] < 2:
            raise UsageError(
                f"config.model.num_layers={self.num_layers}, outer_layers={self.outer_layers} must be at least 1, and so "
                f"must slice_shape={self.shapes[0]}, the last of it at least 2."
            )

    def setup(self) -> None:
        """The blocks."""
        make = self.mixers[0]
        self.outer = [Outer(make, self.options, shape, self.outer_layers) for shape in self.shapes]
        self.tell = [Dense(self.embed_dim, use_bias=False, **self.options.types) for _ in self.shapes]
        self.inner = [Block(make, self.options) for _ in range(self.num_layers)]
        self.norm = self.options.make_norm()()

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Lines:
        """See Backbone: of each level a slice, its context, and one state for each of its places and outer layers."""
        mixer, dtype = self.mixers[0](), self.options.types["dtype"]
        slices, most = [], max_len
        for shape in self.shapes:
            places = math.prod(shape)
            columns = tuple(
                mixer.init_state(batch_size * places, -(-most // places), 1) for _ in range(self.outer_layers)
            )
            empty = jnp.zeros((batch_size, places, self.embed_dim), dtype)
            slices.append(Slice(empty, jnp.zeros_like(empty), columns))
            most = places
        return Lines(
            jnp.zeros((), jnp.int32),
            jnp.zeros((batch_size, math.prod(self.shapes[0]), self.position_axes), jnp.int32),
            tuple(slices),
            tuple(mixer.init_state(batch_size, most + 1, most) for _ in range(self.num_layers)),
        )

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: Lines | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Lines | None]:
        """See Backbone."""
        if tokens.segment is not None or (state is not None and len(tokens.step) > 1):
            raise ValueError(
                "lines are filled alike in all examples: without packed segments, and one by one in one order"
            )
        if state is None:
            return self.norm(self._whole(x, tokens, deterministic)), None
        forward, backward, remembered = time_order(tokens)
        blocks = Unbound(self, self.variables["params"])
        fresh = self.init_state(len(x), math.prod(self.shapes[0]), 1)
        step: Any = functools.partial(_one_token, blocks, fresh)
        each = (jnp.swapaxes(take(x, forward), 0, 1), jnp.swapaxes(take(tokens.position, forward), 0, 1))
        if tokens.num_remembered in (0, x.shape[1]) and not tokens.padded:
            remembers = tokens.num_remembered > 0
            state, out = jax.lax.scan(lambda carry, fed: step(carry, *fed, remembers), state, each)
        else:
            state, out = jax.lax.scan(
                lambda carry, fed: jax.lax.cond(
                    fed[2],
                    lambda: step(carry, *fed[:2], True),
                    lambda: step(carry, *fed[:2], False),
                ),
                state,
                (*each, remembered[0]),
            )
        return self.norm(take(jnp.swapaxes(out, 0, 1), backward)), state

    def _whole(self, x: Array, tokens: Tokens, deterministic: bool) -> Array:
        """All tokens at once, as they are fed."""
        (batch, length, _), width, places = x.shape, self.shapes[-1][0], math.prod(self.shapes[0])
        _, backward, remembered = time_order(tokens)
        # How many come before each: its place in the lines or, of a query, how many it may read.
        rank, remembered = (take(a, backward) for a in (jnp.cumsum(remembered, axis=1) - remembered, remembered))
        count = -(-length // places) * places
        slot = jnp.broadcast_to(jnp.where(remembered, rank, count), (batch, length))

        def in_slots(a: Array) -> Array:
            a = jnp.broadcast_to(a, (batch, *a.shape[1:]))
            empty = jnp.zeros((batch, count, a.shape[2]), a.dtype)
            return jax.vmap(lambda row, i, new: row.at[i].set(new, mode="drop"))(empty, slot, a)

        y, position, group = in_slots(x), in_slots(tokens.position), count
        told = jnp.zeros((batch, count + places, self.embed_dim), y.dtype)
        for outer, tell, shape in zip(self.outer, self.tell, self.shapes, strict=True):
            size = math.prod(shape)
            cells = (-1, group // size, size)
            context = outer(y.reshape(*cells, y.shape[2]), position.reshape(*cells, position.shape[2]), deterministic)
            if group == count:  # behind the last slice a query may ask for the next
                context = jnp.pad(context, ((0, 0), (1, 0), (0, 0), (0, 0))).reshape(batch, count + places, -1)
            else:
                context = jnp.pad(context[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0))).reshape(batch, count, -1)
                context = jnp.pad(context, ((0, 0), (0, places), (0, 0)))
            own = tell(context)
            y, told, group = y + own[:, :count], told + own, size
        x = x + take(told, rank)
        fed = jnp.arange(length)[None] < tokens.num_remembered
        step = jnp.where(remembered, rank, jnp.where(fed, NEVER, rank - 1))
        inside = dataclasses.replace(tokens, step=step, segment=rank // width)
        for block in self.inner:
            x, _ = block(x, inside, None, None, deterministic)
        return x


@dataclasses.dataclass(frozen=True)
class Unbound:
    """The blocks as functions of their parameters: they run inside loops and branches."""

    model: AxialTransformer
    params: Any

    def inner(self, i: int, x: Array, tokens: Tokens, state: State | None) -> tuple[Array, State | None]:
        """An inner block."""
        block = Block(self.model.mixers[0], self.model.options, parent=None)
        return cast(Any, block.apply({"params": self.params[f"inner_{i}"]}, x, tokens, None, state, True))

    def tell(self, level: int, context: Array) -> Array:
        """A context, projected."""
        dense = Dense(context.shape[-1], use_bias=False, **self.model.options.types, parent=None)
        return cast(Array, dense.apply({"params": self.params[f"tell_{level}"]}, context))

    def outer(self, level: int, *given: Any) -> tuple[Array, State]:
        """A context, and the states of its columns."""
        model = self.model
        outer = Outer(model.mixers[0], model.options, model.shapes[level], model.outer_layers, parent=None)
        return cast(Any, outer.apply({"params": self.params[f"outer_{level}"]}, *given, method="next"))


def _one_token(
    blocks: Unbound, fresh: Lines, state: Lines, x: Array, position: Array, remembers: bool
) -> tuple[Lines, Array]:
    """One token x [B, D] at [B or 1, axes]: the inner blocks and, where it fills a slice, the outer ones of its level."""
    hidden, slices = x[:, None], []
    for level, own in enumerate(state.slices):
        place = state.count % own.filling.shape[1]
        filling = jax.lax.dynamic_update_slice_in_dim(own.filling, hidden.astype(own.filling.dtype), place, axis=1)
        slices.append(dataclasses.replace(own, filling=filling))
        hidden = hidden + blocks.tell(level, jax.lax.dynamic_slice_in_dim(own.context, place, 1, axis=1))
    begins = place == 0  # the last level's slices are lines
    token, inner = Tokens(state.count[None, None], position[:, None], 1), []
    if not remembers:  # padding goes before it: it takes the place of what is remembered, and is read by nobody
        hidden = jnp.concatenate([hidden, hidden], axis=1)
        step = jnp.stack([jnp.full((), NEVER), state.count - 1])[None]
        token = Tokens(step, jnp.stack([position, position], axis=1), 1, padded=True)
    for i, (new, old) in enumerate(zip(fresh.inner, state.inner, strict=True)):
        own = jax.tree.map(lambda a, b: jnp.where(begins, a, b), new, old)
        hidden, after = blocks.inner(i, hidden, token, own)
        inner.append(after)
    if not remembers:
        return state, hidden[:, 1]
    where = state.count % state.position.shape[1]
    here = jnp.broadcast_to(position[:, None], (len(x), 1, position.shape[-1]))
    places = jax.lax.dynamic_update_slice_in_dim(state.position, here, where, axis=1)
    state = Lines(state.count + 1, places, tuple(slices), tuple(inner))
    for level, own in enumerate(slices):
        full = state.count % own.filling.shape[1] == 0
        run = functools.partial(_next_slice, blocks, fresh, level)
        state = jax.lax.cond(full, run, lambda state: state, state)
    return state, hidden[:, 0]


def _next_slice(blocks: Unbound, fresh: Lines, level: int, state: Lines) -> Lines:
    """What a full slice, and those before it in the slice around it, tell the next; where that one is full, too, nothing."""
    own = state.slices[level]
    size = own.filling.shape[1]
    number = state.count // size - 1
    if level:
        around = state.slices[level - 1].filling.shape[1]
        number = number % (around // size)
    start = (state.count - size) % state.position.shape[1]
    position = jax.lax.dynamic_slice_in_dim(state.position, start, size, axis=1)
    context, columns = blocks.outer(level, own.filling, position, number, own.columns)
    new = dataclasses.replace(own, context=context, columns=columns)
    if level:
        ends = state.count % around == 0
        empty = dataclasses.replace(fresh.slices[level], filling=own.filling)
        new = jax.tree.map(lambda a, b: jnp.where(ends, a, b), empty, new)
    return dataclasses.replace(state, slices=(*state.slices[:level], new, *state.slices[level + 1 :]))
