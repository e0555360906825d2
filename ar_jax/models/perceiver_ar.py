"""Perceiver AR (S048, arXiv:2202.07765): few latents, one for each asked token, read a long input once and then each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import NEVER, State, Tokens, take
from ar_jax.mixers.softmax import Cache, Softmax
from ar_jax.models.blocks import ACTIVATIONS, BlockOptions, MakeMixer
from ar_jax.models.cross import CrossBlock
from ar_jax.models.decoder import Stack

QUERIES = ("linear", "identity", "learned")


@struct.dataclass
class Latents:
    """What is remembered.

    Attributes:
      count: int32 scalar, how many tokens have had latents.
      inputs: of each cross-attention, the keys and values of all tokens.
      layers: the states of the layers among latents: of the last num_latents tokens alone.
    """

    count: Array
    inputs: tuple[Cache, ...]
    layers: tuple[State, ...]


class PerceiverAR(nn.Module):
    """Cross-attention from latents to all of the past, then layers among latents; see `Backbone`, for a feed without queries.

    z_t = q(x_t) + cross(q(x_t), x_<=t);   z_t = layers(z_s ... z_t),  s the first latent, or t - num_latents + 1

    Only tokens that are asked have latents: T inputs of which M are asked cost O(T) projections, O(M T) attention once, and
    layers over M. Trained by an objective with `num_answers`, a run of M tokens anywhere is asked; sampled, each token is,
    and the layers' cache is a ring of the last num_latents.

    Attributes:
      num_layers: among latents, of width decoder_dim and mixer decoder_mixers; `mixers` is the cross-attention's.
      decoder_dim: the latents' width; 0 takes embed_dim, the inputs'.
      num_latents: how many tokens back a latent reads latents.
      cross_after: behind how many of the layers latents read the inputs, once for each number.
      cross_mlp_dim: hidden width of the MLP behind a cross-attention; None takes what `options` says.
      query: what a latent is at first: its token through a "linear" layer, its token as it is ("identity"), or "learned",
        num_latents vectors in turn.
      query_layers: so many dense layers, each with an activation, follow.
      query_offset: latents read the inputs from so many places further on.
      query_residual: a latent is added to what it has read of the inputs.
      own_keys: latents read the tokens that have latents as these, normed as these, and the others as inputs.
      latents_per_token: latents that stand side by side for a token, told apart by a learned vector; their mean answers.
      final_norm: a norm follows the last layer.
      input_dropout_rate: so many of the inputs are hidden from the latents in training.
    """

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions
    decoder_mixers: tuple[MakeMixer, ...]
    num_layers: int = 4
    decoder_dim: int = 0
    num_latents: int = 64
    cross_after: Sequence[int] = (0,)
    cross_mlp_dim: int | None = None
    query: str = "linear"
    query_layers: int = 0
    query_offset: int = 0
    query_residual: bool = True
    own_keys: bool = False
    latents_per_token: int = 1
    final_norm: bool = True
    input_dropout_rate: float = 0.0

    reads_blanks: ClassVar[bool] = True
    reads_asked: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """The latents'."""
        return self.decoder_dim or self.embed_dim

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Cross-attentions, and the layers behind them: (how many, how many) from the first to the last."""
        places = sorted({0, *self.cross_after})
        ends = [*places[1:], self.num_layers]
        return tuple((list(self.cross_after).count(a), b - a) for a, b in zip(places, ends, strict=True))

    @nn.nowrap
    def check(self) -> None:
        """Raises UsageError for mixers or sizes that latents do not have."""
        choose(dict.fromkeys(QUERIES), self.query, "model.query")
        for mixers in (self.mixers, self.decoder_mixers):
            mixer = mixers[0]()
            if len(mixers) > 1 or not isinstance(mixer, Softmax) or mixer.window or mixer.forget_gate:
                raise UsageError(
                    "config.model.kind='perceiver_ar' needs the mixer 'softmax' without a window or forget gate."
                )
        if self.num_layers < 1 or not all(0 <= place <= self.num_layers for place in self.cross_after):
            raise UsageError(
                f"config.model.cross_after={tuple(self.cross_after)} must lie between 0 and num_layers={self.num_layers}, "
                "which must be at least 1."
            )
        if min(self.num_latents, self.latents_per_token) < 1 or not 0 <= self.input_dropout_rate < 1:
            raise UsageError(
                f"config.model.num_latents={self.num_latents} and latents_per_token={self.latents_per_token} must be at "
                f"least 1, and input_dropout_rate={self.input_dropout_rate} in [0, 1)."
            )
        if self.width != self.embed_dim and (self.query == "identity" or self.own_keys):
            raise UsageError(
                f"config.model.query='identity' and own_keys need latents as wide as inputs; leave decoder_dim={self.width} out."
            )
        if self.own_keys and self.latents_per_token > 1:
            raise UsageError("config.model.own_keys needs latents_per_token=1.")
        if self.options.adaln != "none" or not self.options.norm_first:
            raise UsageError("config.model.kind='perceiver_ar' needs config.model.adaln='none' and norm_first=True.")

    @nn.nowrap
    def _stacks(self) -> list[Stack]:
        """The layers behind each place of cross-attentions."""
        near: Any = functools.partial(self.decoder_mixers[0], **{"window": self.num_latents})
        return [Stack((near,), n, self.options, parent=None) for _, n in self.stages if n]

    def setup(self) -> None:
        """The latents' first values, cross-attentions and layers."""
        types, width = self.options.types, self.width
        near: Any = self.mixers[0]()
        # Heads are as wide as inputs make them, however wide the latents are.
        own = {} if near.head_dim else {"head_dim": near.dims[2]}
        far: Any = functools.partial(self.mixers[0], **{"embed_dim": width} | own)
        options = dataclasses.replace(self.options, mlp_dim=self.cross_mlp_dim or self.options.mlp_dim)
        self.cross = [CrossBlock(far, options, self.query_residual) for _ in self.cross_after]
        self.layers = self._stacks()
        small = nn.initializers.normal(0.02)
        if self.query == "linear":
            self.query_embed = Dense(width, **types)
        if self.query == "learned":
            self.learned = self.param("learned", small, (self.num_latents, width), types["param_dtype"])
        self.query_denses = [Dense(width, **types) for _ in range(self.query_layers)]
        if self.latents_per_token > 1:
            self.side = self.param("side", small, (self.latents_per_token, width), types["param_dtype"])
        if self.final_norm:
            self.norm = self.options.make_norm(self.options.last_norm)()

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Latents:
        """See Backbone: a cache of all inputs for each cross-attention, and rings of num_latents for the layers."""
        inputs = tuple(self.mixers[0]().init_state(batch_size, max_len, max_step_len) for _ in self.cross_after)
        count, step_len = self.latents_per_token * max_len, self.latents_per_token * max_step_len
        layers = tuple(stack.init_state(batch_size, count, step_len) for stack in self._stacks())
        return Latents(jnp.zeros((), jnp.int32), inputs, layers)

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: Latents | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Latents | None]:
        """See Backbone; hidden vectors of tokens that are not asked are zeros."""
        batch, length, _ = x.shape
        if tokens.num_remembered < length or (tokens.num_known or length) < length:
            raise UsageError(
                "config.model.kind='perceiver_ar' cannot be asked by queries; set config.feed.kind='shift'."
            )
        if tokens.segment is not None:
            raise ValueError("latents of packed segments are not told apart; feed each sequence by itself")
        index, own, latents = None, x, dataclasses.replace(tokens, row=None, blank=None, num_known=None)
        if tokens.asked is not None and tokens.num_asked is not None and tokens.num_asked < length:
            index = jnp.argsort(~tokens.asked, axis=1, stable=True)[:, : tokens.num_asked]
            own, step, position = (
                take(jnp.broadcast_to(a, (max(len(a), len(index)), *a.shape[1:])), index)
                for a in (x, tokens.step, tokens.position)
            )
            latents = dataclasses.replace(latents, step=step, position=position, num_remembered=tokens.num_asked)
        count = jnp.zeros((), jnp.int32) if state is None else state.count
        z, latents = self._first(own, latents, count)
        z, inputs, layers = self._read(z, x, tokens, latents, index, state, deterministic)
        z = self.norm(z) if self.final_norm else z
        z = z.reshape(batch, own.shape[1], self.latents_per_token, self.width).mean(axis=2)
        if index is not None:
            rows = jnp.arange(batch)[:, None]
            z = jnp.zeros((batch, length, self.width), z.dtype).at[rows, index].set(z)
        return z, None if state is None else Latents(count + own.shape[1], inputs, layers)

    def _first(self, own: Array, latents: Tokens, count: Array) -> tuple[Array, Tokens]:
        """Latents before they have read anything, [B, n, D'], from their tokens [B, n, D], and when and where they are."""
        if self.query == "learned":
            rows = self.learned[(count + jnp.arange(own.shape[1])) % self.num_latents]
            z = jnp.broadcast_to(rows.astype(own.dtype)[None], (*own.shape[:2], self.width))
        else:
            z = self.query_embed(own) if self.query == "linear" else own
        if self.latents_per_token > 1:
            repeated = functools.partial(jnp.repeat, repeats=self.latents_per_token, axis=1)
            z = repeated(z) + jnp.tile(self.side.astype(z.dtype), (own.shape[1], 1))[None]
            step, position = repeated(latents.step), repeated(latents.position)
            latents = dataclasses.replace(latents, step=step, position=position, num_remembered=z.shape[1])
        for dense in self.query_denses:
            z = ACTIVATIONS[self.options.activation](dense(z))
        return z, latents

    def _read(
        self,
        z: Array,
        x: Array,
        tokens: Tokens,
        latents: Tokens,
        index: Array | None,
        state: Latents | None,
        deterministic: bool,
    ) -> tuple[Array, tuple[Cache, ...], tuple[State, ...]]:
        """Cross-attentions and layers in turn: latents z, and the states after."""
        known = dataclasses.replace(tokens, step=self._hidden(tokens.step, len(x), deterministic))
        placed = (latents.position >= 0).all(axis=-1, keepdims=True)
        ahead = jnp.where(placed, jnp.maximum(latents.position + self.query_offset, 0), latents.position)
        asking = dataclasses.replace(latents, position=ahead if self.query_offset else latents.position)
        inputs: list[Cache] = []
        layers: list[State] = []
        for crosses, count in self.stages:
            for _ in range(crosses):
                cross = self.cross[len(inputs)]
                readable = self._entries(cross, z, x, known, latents, index)
                readable = readable if state is None else state.inputs[len(inputs)].append(readable)
                z = cross(z, asking, readable, deterministic)
                inputs.append(readable)
            if count:
                before = None if state is None else state.layers[len(layers)]
                among = dataclasses.replace(latents, num_readable=None)
                z, after = self.layers[len(layers)](z, among, None, before, deterministic)
                layers.append(after)
        return z, tuple(inputs), tuple(layers)

    def _entries(
        self, cross: CrossBlock, z: Array, x: Array, tokens: Tokens, latents: Tokens, index: Array | None
    ) -> Cache:
        """What all tokens leave for a cross-attention."""
        if not self.own_keys:
            return cross.entries(x, tokens)
        own = cross.entries(z, latents, own=True)
        if index is None:
            if self.is_initializing():  # where only some tokens are asked, others are inputs
                cross.entries(x, tokens)
            return dataclasses.replace(own, step=jnp.broadcast_to(tokens.step, own.step.shape))
        entries, rows = cross.entries(x, tokens), jnp.arange(len(x))[:, None]

        def put(all_of: Array, some: Array) -> Array:  # [B, K, S, H]
            moved = jnp.swapaxes(all_of, 1, 2).at[rows, index].set(jnp.swapaxes(some, 1, 2))
            return jnp.swapaxes(moved, 1, 2)

        return dataclasses.replace(entries, k=put(entries.k, own.k), v=put(entries.v, own.v))

    def _hidden(self, step: Array, batch: int, deterministic: bool) -> Array:
        """The steps of the inputs, some of which are hidden in training."""
        if deterministic or not self.input_dropout_rate:
            return step
        shape = (batch, step.shape[1])
        hide = jax.random.bernoulli(self.make_rng("dropout"), self.input_dropout_rate, shape)
        return jnp.where(hide, NEVER, step)
