"""Two passes (ARPG, S052, arXiv:2503.10568): contents read one another, then queries read what the contents left."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.mixers.protocol import State, Tokens
from ar_jax.mixers.softmax import Cache, Softmax
from ar_jax.models.blocks import Block, BlockOptions, MakeMixer
from ar_jax.models.decoder import Stack


class Shared(nn.Module):
    """One half of an attention: it writes a cache for others to read, or reads one that others have written."""

    make_mixer: MakeMixer

    def setup(self) -> None:
        """The attention, of which only one half has parameters."""
        self.attention: Any = self.make_mixer()

    def __call__(self, x: Array, tokens: Tokens, state: Cache) -> tuple[Array, None]:
        """A mixer that only reads: tokens x [B, T, D] to what they find in the cache, [B, T, D]."""
        return self.attention.attend(x, tokens, state), None

    def entries(self, x: Array, tokens: Tokens) -> Cache:
        """What tokens x [B, T, D] leave for others."""
        return self.attention.entries(x, tokens)


class ReadingLayer(nn.Module):
    """The body of the scan over the second pass."""

    make_mixer: MakeMixer
    options: BlockOptions
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, tokens: Tokens, readable: Cache) -> tuple[Array, None]:
        """The scan's carry is x, [B, T, D]."""
        make: Any = functools.partial(Shared, self.make_mixer)
        block = Block(make, self.options, name="block")
        return block(x, tokens, None, readable, self.deterministic)[0], None


class TwoPass(nn.Module):
    """The first half of the layers runs over contents, the second over queries; see `Backbone`, for feed "query".

    What the first half makes of the contents gives one set of keys and values, which the queries read in all layers of the
    second half. So each token passes half the layers, and only half of them have a cache. Only queries may be asked.
    """

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions
    num_layers: int = 4

    reads_blanks: ClassVar[bool] = True

    @nn.nowrap
    def check(self) -> None:
        """Raises UsageError for an odd number of layers, or a mixer that is no softmax attention over all steps."""
        if self.num_layers % 2 or len(self.mixers) > 1:
            raise UsageError(
                f"config.model.num_layers={self.num_layers} must be even for kind 'two_pass', and its mixer a single one."
            )
        mixer = self.mixers[0]()
        if not isinstance(mixer, Softmax) or mixer.window:
            raise UsageError("config.model.kind='two_pass' needs the mixer 'softmax' without a window.")
        self._contents().num_repeats  # noqa: B018  (the property checks)

    @nn.nowrap
    def _contents(self, name: str | None = None) -> Stack:
        return Stack(self.mixers, self.num_layers // 2, self.options, name=name)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> State:
        """See Backbone: the caches of the first pass, and the one that the second pass reads."""
        first = self._contents().init_state(batch_size, max_len, max_step_len)
        return first, self.mixers[0]().init_state(batch_size, max_len, max_step_len)

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: State | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, State | None]:
        """See Backbone."""
        n, norm = tokens.num_remembered, self.options.make_norm()
        content, query = tokens.part(slice(0, n)), tokens.part(slice(n, None))
        first, shared = (None, None) if state is None else state
        told, first = self._contents("contents")(x[:, :n], content, None, first, deterministic)
        readable = Shared(self.mixers[0], name="shared").entries(norm(name="shared_norm")(told), content)
        if shared is not None:
            readable = shared = shared.append(readable)
        scan = nn.scan(
            self.options.rematerialised(ReadingLayer),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.num_layers // 2,
        )
        answers, _ = scan(self.mixers[0], self.options, deterministic, name="queries")(x[:, n:], query, readable)
        hidden = jnp.concatenate([jnp.zeros_like(told), norm(name="norm")(answers)], axis=1)
        return hidden, None if state is None else (first, shared)
