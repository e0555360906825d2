"""Axial Transformer (S020, arXiv:1912.12180): what past lines tell is computed once a line, then its tokens one by one."""

from __future__ import annotations

import dataclasses
import functools
import math
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
class Lines:
    """What is remembered.

    Attributes:
      count: int32 scalar, how many tokens have come.
      line: [B, W, D], embeddings of the line that is being filled.
      position: [B, W, axes] int32, of these.
      context: [B, W, D], what all lines before it tell each of its places.
      columns: the states of the outer column mixers, B W sequences each.
      inner: the states of the inner mixers, for the tokens of this line.
    """

    count: Array
    line: Array
    position: Array
    context: Array
    columns: State
    inner: State


class AxialTransformer(nn.Module):
    """Tokens, in the order of their generation, fill lines of W; see `Backbone`.

    outer: u = blocks(lines), along each line in both directions, then along each column from the first line to its own
    inner: h_t = blocks(x_t + W u_{line(t) - 1, column(t)}), along the line, from its first token to its own

    A token sees all of its past: its line through the inner blocks, all lines before through the outer ones. In raster
    order lines are the rows of an image. While sampling, the outer blocks run when a line is full, once for all the places
    of the next; a token costs the inner blocks alone.

    Attributes:
      num_layers: inner blocks.
      outer_layers: outer pairs, a block along lines and one along columns.
      line_length: W; 0 takes the side of a square image.
    """

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions
    num_rows: int
    num_prefix: int
    position_axes: int
    num_layers: int = 2
    outer_layers: int = 1
    line_length: int = 0

    reads_blanks: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Tokens of a line."""
        return self.line_length or math.isqrt(self.num_rows - self.num_prefix)

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
        if self.num_layers < 1 or self.outer_layers < 1 or self.width < 2:
            raise UsageError(
                f"config.model.num_layers={self.num_layers}, outer_layers={self.outer_layers} must be at least 1, and "
                f"line_length={self.width} at least 2."
            )

    def setup(self) -> None:
        """The blocks."""
        make = self.mixers[0]
        self.along_lines = [Block(make, self.options) for _ in range(self.outer_layers)]
        self.along_columns = [Block(make, self.options) for _ in range(self.outer_layers)]
        self.inner = [Block(make, self.options) for _ in range(self.num_layers)]
        self.outer_norm, self.norm = self.options.make_norm()(), self.options.make_norm()()
        self.tell = Dense(self.embed_dim, use_bias=False, **self.options.types)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Lines:
        """See Backbone: a line, its context, and one state for each column and outer layer."""
        width, mixer, dtype = self.width, self.mixers[0](), self.options.types["dtype"]
        lines = -(-max_len // width)
        empty = jnp.zeros((batch_size, width, self.embed_dim), dtype)
        return Lines(
            jnp.zeros((), jnp.int32),
            empty,
            jnp.zeros((batch_size, width, self.position_axes), jnp.int32),
            jnp.zeros_like(empty),
            tuple(mixer.init_state(batch_size * width, lines, 1) for _ in range(self.outer_layers)),
            tuple(mixer.init_state(batch_size, width + 1, width) for _ in range(self.num_layers)),
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
        blocks = Unbound(self.mixers[0], self.options, self.variables["params"])
        step: Any = functools.partial(_one_token, blocks, self.init_state(len(x), self.width, 1).inner)
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
        (batch, length, _), width = x.shape, self.width
        _, backward, remembered = time_order(tokens)
        # How many come before each: its place in the lines or, of a query, how many it may read.
        rank, remembered = (take(a, backward) for a in (jnp.cumsum(remembered, axis=1) - remembered, remembered))
        count = -(-length // width) * width
        slot = jnp.broadcast_to(jnp.where(remembered, rank, count), (batch, length))

        def folded(a: Array) -> Array:
            a = jnp.broadcast_to(a, (batch, *a.shape[1:]))
            empty = jnp.zeros((batch, count, a.shape[2]), a.dtype)
            filled = jax.vmap(lambda row, i, new: row.at[i].set(new, mode="drop"))(empty, slot, a)
            return filled.reshape(batch, -1, width, a.shape[2])

        told = self._outer(folded(x), folded(tokens.position), deterministic)
        told = jnp.pad(told, ((0, 0), (1, 0), (0, 0), (0, 0))).reshape(batch, -1, self.embed_dim)
        x = x + self.tell(take(told, rank))
        fed = jnp.arange(length)[None] < tokens.num_remembered
        step = jnp.where(remembered, rank, jnp.where(fed, NEVER, rank - 1))
        inside = dataclasses.replace(tokens, step=step, segment=rank // width)
        for block in self.inner:
            x, _ = block(x, inside, None, None, deterministic)
        return x

    def _outer(self, lines: Array, position: Array, deterministic: bool) -> Array:
        """Embeddings [B, lines, W, D] to what each line, and those before it, tell each column."""
        batch, count, width, dim = lines.shape
        along = Tokens(jnp.zeros((1, width), jnp.int32), position.reshape(batch * count, width, -1), width)
        place = jnp.swapaxes(position, 1, 2).reshape(batch * width, count, -1)
        down = Tokens(jnp.arange(count, dtype=jnp.int32)[None], place, count)
        for rows, columns in zip(self.along_lines, self.along_columns, strict=True):
            lines = rows(lines.reshape(-1, width, dim), along, None, None, deterministic)[0].reshape(lines.shape)
            turned = jnp.swapaxes(lines, 1, 2).reshape(-1, count, dim)
            turned = columns(turned, down, None, None, deterministic)[0].reshape(batch, width, count, dim)
            lines = jnp.swapaxes(turned, 1, 2)
        return self.outer_norm(lines)


@dataclasses.dataclass(frozen=True)
class Unbound:
    """The blocks as functions of their parameters: they run inside loops and branches."""

    make_mixer: MakeMixer
    options: BlockOptions
    params: Any

    def block(self, name: str, x: Array, tokens: Tokens, state: State | None) -> tuple[Array, State | None]:
        """The block of that name."""
        block = Block(self.make_mixer, self.options, parent=None)
        return cast(Any, block.apply({"params": self.params[name]}, x, tokens, None, state, True))

    def tell(self, context: Array) -> Array:
        """A context, projected."""
        dense = Dense(context.shape[-1], use_bias=False, **self.options.types, parent=None)
        return cast(Array, dense.apply({"params": self.params["tell"]}, context))

    def outer_norm(self, x: Array) -> Array:
        """The norm of a context."""
        return cast(Array, self.options.make_norm()(parent=None).apply({"params": self.params["outer_norm"]}, x))


def _one_token(
    blocks: Unbound, fresh: State, state: Lines, x: Array, position: Array, remembers: bool
) -> tuple[Lines, Array]:
    """One token x [B, D] at [B or 1, axes]: the inner blocks and, where it fills a line, the outer ones."""
    width = state.line.shape[1]
    column = state.count % width
    begins = column == 0
    hidden = x[:, None] + blocks.tell(jax.lax.dynamic_slice_in_dim(state.context, column, 1, axis=1))
    token, inner = Tokens(state.count[None, None], position[:, None], 1), []
    if not remembers:  # padding goes before it: it takes the place of what is remembered, and is read by nobody
        hidden = jnp.concatenate([hidden, hidden], axis=1)
        step = jnp.stack([jnp.full((), NEVER), state.count - 1])[None]
        token = Tokens(step, jnp.stack([position, position], axis=1), 1, padded=True)
    for i, (new, old) in enumerate(zip(fresh, state.inner, strict=True)):
        own = jax.tree.map(lambda a, b: jnp.where(begins, a, b), new, old)
        hidden, after = blocks.block(f"inner_{i}", hidden, token, own)
        inner.append(after)
    if not remembers:
        return state, hidden[:, 1]
    place = jnp.broadcast_to(position[:, None], (len(x), 1, position.shape[-1]))
    state = dataclasses.replace(
        state,
        count=state.count + 1,
        line=jax.lax.dynamic_update_slice_in_dim(state.line, x[:, None].astype(state.line.dtype), column, axis=1),
        position=jax.lax.dynamic_update_slice_in_dim(state.position, place, column, axis=1),
        inner=tuple(inner),
    )
    state = jax.lax.cond(column == width - 1, functools.partial(_next_line, blocks), lambda state: state, state)
    return state, hidden[:, 0]


def _next_line(blocks: Unbound, state: Lines) -> Lines:
    """What a full line, and those before it, tell the next."""
    batch, width, dim = state.line.shape
    along = Tokens(jnp.zeros((1, width), jnp.int32), state.position, width)
    line = (state.count // width - 1)[None, None]
    down = Tokens(line, state.position.reshape(batch * width, 1, -1), 1)
    x, columns = state.line, []
    for i, before in enumerate(state.columns):
        x, _ = blocks.block(f"along_lines_{i}", x, along, None)
        turned, after = blocks.block(f"along_columns_{i}", x.reshape(-1, 1, dim), down, before)
        x = turned.reshape(batch, width, dim)
        columns.append(after)
    return dataclasses.replace(state, context=blocks.outer_norm(x), columns=tuple(columns))
