"""Block Transformer (S148, arXiv:2406.02657): blocks read one another, tokens read what the blocks before told theirs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import NEVER, State, Tokens, take
from ar_jax.mixers.softmax import Softmax
from ar_jax.models.blocks import BlockOptions, MakeMixer
from ar_jax.models.cross import CrossDecoder
from ar_jax.models.decoder import Decoder

STRATEGIES = ("prefix", "summation", "cross_attention")


@struct.dataclass
class Blocks:
    """What is remembered.

    Attributes:
      count: int32 scalar, the places of blocks that have been filled or, before the first token, left empty.
      block: [B, L, D / L], embeddings of the block that is being filled.
      present: [B, L] bool, which of these are tokens, and no padding.
      told: [B, K, D'], what the last whole block tells the tokens of the next.
      blocks: the block decoder's state.
      tokens: the token decoder's, for the tokens of one block.
    """

    count: Array
    block: Array
    present: Array
    told: Array
    blocks: State
    tokens: State


class BlockTransformer(nn.Module):
    """A decoder over blocks of L tokens, and one inside the block; see `Backbone`, for a feed without queries.

    e_b = [x_bL W ... x_bL+L-1 W];   c_b = blocks(e_0 ... e_b);   h_bL+i = tokens(c_b-1 V, x_bL ... x_bL+i)

    Attention over all of the past is among blocks, so their cache has one entry for L tokens and is read once for L tokens;
    the tokens' cache never holds more than a block. The first block ends with the last prefix token; what it lacks in
    front is a learned embedding, and so is padding.

    Attributes:
      num_layers: of the block decoder, whose width is embed_dim.
      decoder_dim: the token decoder's width; 0 takes embed_dim.
      decoder_layers: of the token decoder; 0 takes num_layers.
      decoder_mlp_dim: hidden width of the token decoder's MLPs; None takes what `options` says.
      block_length: L.
      strategy: how a block tells the next one's tokens: as tokens in front of them ("prefix"), added to them ("summation"),
        or read by cross-attention in each layer ("cross_attention").
      expansion: K, how many vectors a block tells; 0 takes 2 for a prefix, else L.
    """

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions
    num_rows: int
    num_prefix: int
    decoder_mixers: tuple[MakeMixer, ...]
    num_layers: int = 2
    decoder_dim: int = 0
    decoder_layers: int = 0
    decoder_mlp_dim: int | None = None
    block_length: int = 4
    strategy: str = "prefix"
    expansion: int = 0

    reads_blanks: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """The token decoder's."""
        return self.decoder_dim or self.embed_dim

    @property
    def num_told(self) -> int:
        """K."""
        return self.expansion or (2 if self.strategy == "prefix" else self.block_length)

    @property
    def lead(self) -> int:
        """Tokens of the token decoder whose last one answers for a block's first token."""
        return self.num_told if self.strategy == "prefix" else 1

    @property
    def num_empty(self) -> int:
        """Places of the first block in front of the prefix."""
        return -self.num_prefix % self.block_length

    @nn.nowrap
    def check(self) -> None:
        """Raises UsageError for sizes or mixers that blocks do not have."""
        choose(dict.fromkeys(STRATEGIES), self.strategy, "model.strategy")
        length = self.block_length
        if length < 1 or self.embed_dim % length:
            raise UsageError(f"config.model.block_length={length} must divide embed_dim={self.embed_dim}.")
        if self.num_told < 1 or (self.strategy == "summation" and self.num_told != length):
            raise UsageError(
                f"config.model.expansion={self.expansion} must be at least 1 and, to be added, block_length={length}; "
                "leave it out."
            )
        if self.num_prefix < 1 or self.options.adaln != "none" or not self.options.norm_first:
            raise UsageError(
                "config.model.kind='block_transformer' takes its condition as prefix tokens, and norms first; "
                "set config.model.adaln='none', norm_first=True."
            )
        mixer = self.decoder_mixers[0]()
        softmax = len(self.decoder_mixers) == 1 and isinstance(mixer, Softmax) and not mixer.window
        if self.strategy == "cross_attention" and not softmax:
            raise UsageError(
                "config.model.strategy='cross_attention' needs config.model.decoder_mixer 'softmax' without a window."
            )
        for decoder in (self._block_decoder(), self._token_decoder()):
            if isinstance(decoder, Decoder):
                decoder.check()

    @nn.nowrap
    def _block_decoder(self) -> Decoder:
        mixers = _placed(self.mixers, -(-self.num_rows // self.block_length))
        return Decoder(self.embed_dim, mixers, self.options, self.num_layers, parent=None)

    @nn.nowrap
    def _token_decoder(self) -> Decoder | CrossDecoder:
        options = dataclasses.replace(self.options, mlp_dim=self.decoder_mlp_dim or self.options.mlp_dim)
        mixers = _placed(self.decoder_mixers, self.lead + self.block_length - 1)
        layers = self.decoder_layers or self.num_layers
        if self.strategy == "cross_attention":
            return CrossDecoder(mixers[0], layers, options, parent=None)
        return Decoder(self.width, mixers, options, layers, parent=None)

    def setup(self) -> None:
        """Embeddings and both decoders."""
        types, small = self.options.types, nn.initializers.normal(0.02)
        dense = functools.partial(Dense, use_bias=False, **types)
        self.embed, self.token_embed = dense(self.embed_dim // self.block_length), dense(self.width)
        self.expand = Dense(self.num_told * self.width, **types)
        self.empty = self.param("empty", small, (self.embed_dim // self.block_length,), types["param_dtype"])
        if self.strategy != "prefix":
            self.start = self.param("start", small, (self.width,), types["param_dtype"])
        self.blocks, self.tokens = self._block_decoder(), self._token_decoder()

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Blocks:
        """See Backbone: a cache with one entry a block, and one of the length of a block."""
        length, dtype = self.block_length, self.options.types["dtype"]
        blocks = -(-max_len // length) + 1
        return Blocks(
            jnp.full((), self.num_empty, jnp.int32),
            jnp.zeros((batch_size, length, self.embed_dim // length), dtype),
            jnp.zeros((batch_size, length), bool),
            jnp.zeros((batch_size, self.num_told, self.width), dtype),
            self._block_decoder().init_state(batch_size, blocks, 1),
            self._empty_block(batch_size),
        )

    @nn.nowrap
    def _empty_block(self, batch_size: int) -> State:
        """The token decoder's state before a block's first token."""
        size = self.lead + self.block_length - 1
        decoder = self._token_decoder()
        if isinstance(decoder, Decoder):
            return decoder.init_state(batch_size, size, self.lead)
        own, read = (
            tuple(decoder.make_mixer().init_state(batch_size, n, 1) for _ in range(decoder.num_layers))
            for n in (size, self.num_told)
        )
        return own, read

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: Blocks | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Blocks | None]:
        """See Backbone. Padding comes in front of all others, whatever its place."""
        if tokens.num_remembered < x.shape[1] or (tokens.num_known or x.shape[1]) < x.shape[1]:
            raise UsageError(
                "config.model.kind='block_transformer' cannot be asked by queries; set config.feed.kind='shift'."
            )
        if tokens.segment is not None:
            raise ValueError("blocks are filled alike in all examples, without packed segments")
        present, back = jnp.ones((1, x.shape[1]), bool), None
        if tokens.padded:
            present = tokens.step < NEVER
            forward = jnp.argsort(present, axis=1, stable=True)
            x, present, back = take(x, forward), take(present, forward), jnp.argsort(forward, axis=1)
        if state is None:
            out = self._whole(x, present, tokens.padded, deterministic)
        else:
            state, out = self._one_by_one(x, present, tokens.padded, state, self._empty_block(len(x)))
        return out if back is None else take(out, back), state

    def _whole(self, x: Array, present: Array, padded: bool, deterministic: bool) -> Array:
        """All tokens at once."""
        (batch, time, _), length = x.shape, self.block_length
        front, count = self.num_empty, (time + self.num_empty) // length  # whole blocks
        x, present = (jnp.pad(a, ((0, 0), (front, length)) + ((0, 0),) * (a.ndim - 2)) for a in (x, present))
        embedded = self.embed_tokens(x[:, : count * length], present[:, : count * length])
        blocks = embedded.reshape(batch, count, self.embed_dim)
        there = present[:, : count * length].reshape(-1, count, length).any(axis=-1)
        context, _ = self.read_blocks(blocks, jnp.arange(count)[None], there, padded, None, deterministic)
        told = self.expanded(context).reshape(batch * count, self.num_told, self.width)
        own = x[:, length : (count + 1) * length].reshape(batch * count, length, -1)[:, :-1]
        fed = self._fed(self.token_embed(own), told)
        out, _ = self._read(fed, told, None, 0, deterministic)
        out = out[:, self.lead - 1 :].reshape(batch, count * length, self.width)
        return jnp.pad(out, ((0, 0), (length - 1, 0), (0, 0)))[:, front : front + time]

    def embed_tokens(self, x: Array, present: Array) -> Array:
        """Tokens x [B, T, D] to their parts of blocks' embeddings, [B, T, D / L]; padding has one of its own."""
        embedded = self.embed(x)
        return jnp.where(present[..., None], embedded, self.empty.astype(embedded.dtype)[None, None])

    def read_blocks(
        self, blocks: Array, index: Array, there: Array, padded: bool, state: State | None, deterministic: bool
    ) -> tuple[Array, State | None]:
        """The block decoder: embeddings [B, n, D] of blocks index [1, n], unless they only pad, to contexts [B, n, D]."""
        index = index.astype(jnp.int32)
        step = jnp.where(there, index, NEVER) if padded else index
        tokens = Tokens(step, index[..., None], blocks.shape[1], row=index, padded=padded)
        return self.blocks(blocks, tokens, None, state, deterministic)

    def expanded(self, context: Array) -> Array:
        """Contexts [B, n, D] to what they tell, [B, n, K, D']."""
        return self.expand(context).reshape(*context.shape[:2], self.num_told, self.width)

    def _fed(self, own: Array, told: Array) -> Array:
        """The token decoder's input: own [R, T, D'], a block's tokens from its first one, behind what was told [R, K, D']."""
        if self.strategy == "prefix":
            return jnp.concatenate([told, own], axis=1)
        start = jnp.broadcast_to(self.start.astype(own.dtype), (len(own), 1, self.width))
        own = jnp.concatenate([start, own], axis=1)
        return own + told[:, : own.shape[1]] if self.strategy == "summation" else own

    def _read(
        self, fed: Array, told: Array, state: State | None, first: int | Array, deterministic: bool
    ) -> tuple[Array, State | None]:
        """The token decoder: inputs [R, T, D'] from place `first` of the block on to hidden vectors, and the state after."""
        index = (first + jnp.arange(fed.shape[1], dtype=jnp.int32))[None]
        tokens = Tokens(index, index[..., None], fed.shape[1], row=index)
        if isinstance(self.tokens, Decoder):
            return self.tokens(fed, tokens, None, state, deterministic)
        own, read = (None, ()) if state is None else state
        if state is None or isinstance(first, int):
            place = jnp.arange(self.num_told, dtype=jnp.int32)[None]
            memory = Tokens(jnp.zeros_like(place), place[..., None], self.num_told, row=place)
            new = self.tokens.entries(told, memory)
            read = tuple(a.append(b) for a, b in zip(read, new, strict=True)) if read else new
        out, own = self.tokens(fed, tokens, read, own, deterministic)
        return out, None if state is None else (own, read)

    def _one_by_one(self, x: Array, present: Array, padded: bool, state: Blocks, fresh: State) -> tuple[Blocks, Array]:
        """Each token writes into its block; where that is full, the next one begins."""
        bare, params = self.clone(parent=None), {"params": self.variables["params"]}
        each = jnp.swapaxes(x, 0, 1), jnp.swapaxes(present, 0, 1)

        def step(state: Blocks, fed: tuple[Array, Array]) -> tuple[Blocks, Array]:
            x, there = fed[0], jnp.broadcast_to(fed[1], x_batch)
            place = state.count % self.block_length
            part: Any = bare.apply(params, x[:, None], there[:, None], method="embed_tokens")
            block = jax.lax.dynamic_update_slice_in_dim(state.block, part.astype(state.block.dtype), place, 1)
            exists = jax.lax.dynamic_update_slice_in_dim(state.present, there[:, None], place, 1)
            state = dataclasses.replace(state, count=state.count + 1, block=block, present=exists)
            begin: Any = functools.partial(bare.apply, params, fresh=fresh, padded=padded, method="begin_block")
            go_on: Any = functools.partial(bare.apply, params, place=place, method="go_on")
            return jax.lax.cond(place == self.block_length - 1, begin, go_on, state, x)

        x_batch = x.shape[:1]
        state, out = jax.lax.scan(step, state, each)
        return state, jnp.swapaxes(out, 0, 1)

    def begin_block(self, state: Blocks, x: Array, fresh: State, padded: bool) -> tuple[Blocks, Array]:
        """What a full block, and those before it, tell the next, and the answer for the next one's first token, [B, D']."""
        batch, length = len(x), self.block_length
        empty = self.empty.astype(state.block.dtype)[None, None]
        block = jnp.where(state.present[..., None], state.block, empty).reshape(batch, 1, self.embed_dim)
        index = (state.count // length - 1)[None, None]
        there = state.present.any(axis=1, keepdims=True)
        context, blocks = self.read_blocks(block, index, there, padded, state.blocks, True)
        told = self.expanded(context)[:, 0].astype(state.told.dtype)
        fed = self._fed(jnp.zeros((batch, 0, self.width), told.dtype), told)
        out, tokens = self._read(fed, told, fresh, 0, True)
        vacant = jnp.zeros_like(state.present)
        return dataclasses.replace(state, present=vacant, told=told, blocks=blocks, tokens=tokens), out[:, -1]

    def go_on(self, state: Blocks, x: Array, place: Array) -> tuple[Blocks, Array]:
        """The answer of the token x [B, D] at a place of its block, which is not the last, [B, D']."""
        fed = self.token_embed(x)[:, None]
        if self.strategy == "summation":
            fed = fed + jax.lax.dynamic_slice_in_dim(state.told, place + 1, 1, axis=1)
        out, tokens = self._read(fed, state.told, state.tokens, self.lead + place, True)
        return dataclasses.replace(state, tokens=tokens), out[:, -1]


def _placed(mixers: tuple[MakeMixer, ...], length: int) -> tuple[MakeMixer, ...]:
    """The mixers on a line of this length."""
    line: dict[str, Any] = {"position_axes": 1, "grid": (length,), "num_rows": length, "num_prefix": 0}
    return tuple(functools.partial(make, **line) for make in mixers)


def cache_bytes_per_token(backbone: Any, batch_size: int, max_len: int) -> float:
    """Bytes of caches that a token reads at the end of max_len tokens, on average over the tokens of a block.

    Args:
      backbone: a BlockTransformer, or one whose whole state every token reads, such as a Decoder.
      batch_size: B.
      max_len: how many tokens have come.
    """
    state = jax.eval_shape(lambda: backbone.init_state(batch_size, max_len, 1))
    if not isinstance(state, Blocks):
        return _size(state)
    return _size(state.blocks) / backbone.block_length + _size(state.tokens)


def _size(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))
