"""Two generators behind one another: the first draws coarse codes one by one, the second the fine ones at once (CTF)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.feeds.protocol import Chunk
from ar_jax.mixers.protocol import State
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.generator import Context, Embedding, Generator


class Cascade(nn.Module):
    """p(coarse) p(fine | coarse), each by a network with embeddings, width and head of its own (arXiv:2503.16194, sec. 4).

    `Chunk.part` is the number of the one that reads a chunk. A whole sequence, which names none, has what the first one remembers
    in front and what the second one reads behind, and half of its answers are the second's. Hidden vectors are as wide as
    the wider network's: the narrower one's end in zeros, which its head does not read.

    Attributes:
      first: draws the coarse codes; its state is that of the whole.
      second: reads all coarse codes at once, and remembers nothing.
    """

    first: Generator
    second: Generator

    @property
    def decoder(self) -> nn.Module:
        """Of what the state is kept."""
        return self.first.decoder

    @property
    def head(self) -> nn.Module:
        """Tells whether there is a likelihood; both networks have one of its kind."""
        return self.first.head

    @property
    def condition(self) -> nn.Module:
        """What both are told; each embeds it by itself."""
        return self.first.condition

    @property
    def embedding(self) -> Embedding:
        """Of the coarse codes."""
        return self.first.embedding

    @property
    def options(self) -> BlockOptions:
        """Of the blocks."""
        return self.first.options

    @property
    def position(self) -> tuple[tuple[int, ...], ...]:
        """See Generator."""
        return self.first.position

    @property
    def embed_dim(self) -> int:
        """Of the hidden vectors."""
        return max(self.first.embed_dim, self.second.embed_dim)

    vocab_size = property(lambda self: self.first.vocab_size, doc="Of what is fed, which both embed.")
    channels = property(lambda self: self.first.channels, doc="See Generator.")
    num_outputs = property(lambda self: 1, doc="See Generator.")

    def __call__(
        self,
        content: Array,
        context: Context,
        chunk: Chunk,
        state: State | None = None,
        deterministic: bool = True,
        between: Array | None = None,
    ) -> tuple[Array, State | None]:
        """See Generator."""
        if chunk.part == 0:
            hidden, state = self.first(content, context, chunk, state, deterministic)
            return self._padded(hidden), state
        if chunk.part == 1:  # nothing enters the state, and all is read by all
            whole = dataclasses.replace(chunk, num_remembered=len(chunk), num_readable=None)
            return self._padded(self.second(content, context, whole, None, deterministic)[0]), state
        coarse, fine = _parts(chunk)
        cut = len(coarse)
        hidden, state = self(content[:, :cut], context, coarse, state, deterministic)
        refined, state = self(content[:, cut:], context, fine, state, deterministic)
        return jnp.concatenate([hidden, refined], axis=1), state

    def ask(self, method: str, hidden: Array, *args: Any, part: int | None = None, **options: Any) -> Any:
        """Calls a method of the head of one network; with None of both: half of the answers each, the first one's in front."""
        if part is not None:
            generator = (self.first, self.second)[part]
            width = generator.embed_dim
            args = tuple(a[..., :width] if _like(a, hidden) else a for a in args)  # the vectors without a condition
            return generator.ask(method, hidden[..., :width], *args, **options)
        half = hidden.shape[1] // 2
        given = []
        for number, own in enumerate((slice(None, half), slice(half, None))):
            told = (a[:, own] if _answers(a, hidden) else a for a in args)
            given.append(self.ask(method, hidden[:, own], *told, part=number, **options))
        return jnp.concatenate(given, axis=1)

    def init_all(self, content: Array, context: Context, chunk: Chunk, target: Array, key: Array) -> Array:
        """Touches every parameter, for `init`."""
        hidden, _ = self(content, context, chunk)
        return self.ask("loss", chunk.pick(hidden), target, key)

    def _padded(self, hidden: Array) -> Array:
        return jnp.pad(hidden, ((0, 0), (0, 0), (0, self.embed_dim - hidden.shape[-1])))


def _parts(chunk: Chunk) -> tuple[Chunk, Chunk]:
    """What each network reads of a whole sequence; answers are picked by who asked for it."""
    cut, arrays = chunk.num_remembered, ("source", "place", "target", "step")
    parts = []
    for number, here in enumerate((slice(None, cut), slice(cut, None))):
        own = {name: getattr(chunk, name)[..., here] for name in arrays}
        length = own["source"].shape[-1]
        told: dict[str, Any] = {"part": number, "num_known": length, "num_remembered": length * (number == 0)}
        parts.append(dataclasses.replace(chunk, **own, **told))
    return parts[0], parts[1]


def _like(a: Any, hidden: Array) -> bool:
    return isinstance(a, jax.Array) and a.shape == hidden.shape


def _answers(a: Any, hidden: Array) -> bool:
    return isinstance(a, jax.Array) and a.shape[:2] == hidden.shape[:2]
