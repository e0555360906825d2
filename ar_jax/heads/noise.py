"""Noise: where a sampler's randomness comes from, a key or a recording of another run."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from ar_jax.config import UsageError

LEAST = 1e-20  # the argument of a logarithm, where a recorded uniform number is 0 or 1


class Noise(Protocol):
    """Named random arrays. The same name and shape give the same array; `fold_in` gives a source of new ones."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Array:
        """Standard normal numbers, float32."""

    def uniform(self, name: str, shape: tuple[int, ...]) -> Array:
        """Uniform numbers in [0, 1), float32."""

    def gumbel(self, name: str, shape: tuple[int, ...]) -> Array:
        """-log(-log u), float32: the index of the largest of logits + gumbel is a draw from their softmax."""

    def categorical(self, name: str, logits: Array) -> Array:
        """Draws from softmax(logits [..., V]), [...] int32: by Gumbel noise of that name, unless a source has another way."""
        return (logits + self.gumbel(name, logits.shape)).argmax(axis=-1).astype(jnp.int32)

    def fold_in(self, i: ArrayLike) -> Noise:
        """The noise of step i of a loop, which may be traced."""


@struct.dataclass
class Drawn(Noise):
    """Noise from a key.

    Attributes:
      key: seeds all arrays, each together with its name.
    """

    key: Array

    def normal(self, name: str, shape: tuple[int, ...]) -> Array:
        """See Noise."""
        return jax.random.normal(self._key(name), shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Array:
        """See Noise."""
        return jax.random.uniform(self._key(name), shape)

    def gumbel(self, name: str, shape: tuple[int, ...]) -> Array:
        """See Noise."""
        return jax.random.gumbel(self._key(name), shape)

    def categorical(self, name: str, logits: Array) -> Array:
        """See Noise. By inversion, which takes two random numbers a draw instead of V: first a block, then a place in it.

        A token without probability is never drawn.
        """
        vocab_size = logits.shape[-1]
        side = math.isqrt(max(vocab_size - 1, 0)) + 1
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True)).astype(jnp.float32)
        padding = [(0, 0)] * (logits.ndim - 1) + [(0, -vocab_size % side)]
        blocks = jnp.pad(weights, padding).reshape(*logits.shape[:-1], -1, side)
        u = self.uniform(name, (2, *logits.shape[:-1]))
        block = _first_beyond(blocks.sum(axis=-1), u[0])
        place = _first_beyond(jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :], u[1])
        return block * side + place

    def fold_in(self, i: ArrayLike) -> Drawn:
        """See Noise."""
        return Drawn(jax.random.fold_in(self.key, i))

    def _key(self, name: str) -> Array:
        return jax.random.fold_in(self.key, np.uint32(zlib.crc32(name.encode())))


def _first_beyond(weights: Array, u: Array) -> Array:
    """The first index, [...] int32, at which the running sum of weights [..., n] passes the fraction u [...] of all."""
    sums = jnp.cumsum(weights, axis=-1)
    index = (sums <= u[..., None] * sums[..., -1:]).sum(axis=-1)
    last = jnp.where(weights > 0, jnp.arange(weights.shape[-1]), 0).max(axis=-1)  # rounding may lead beyond it
    return jnp.minimum(index, last).astype(jnp.int32)


@struct.dataclass
class Recorded(Noise):
    """Noise that another run has drawn, through the same compiled code.

    Attributes:
      arrays: by name, [steps of the outermost loop, steps of the loop inside it, ..., *shape]: as many leading axes as
        loops were entered where the name is asked for. Under the name of a Gumbel draw stand its uniform numbers.
      index: the steps that lead here. A step that was not recorded gives NaN.
    """

    arrays: Mapping[str, Array]
    index: tuple[ArrayLike, ...] = ()

    def normal(self, name: str, shape: tuple[int, ...]) -> Array:
        """See Noise.

        Raises:
          UsageError: nothing, or an array of another shape, was recorded under this name.
        """
        return self._read(name, shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Array:
        """See Noise and `normal`."""
        return self._read(name, shape)

    def gumbel(self, name: str, shape: tuple[int, ...]) -> Array:
        """See Noise and `normal`; both logarithms' arguments are at least 1e-20."""
        exponential = -jnp.log(jnp.maximum(self._read(name, shape), LEAST))
        return -jnp.log(jnp.maximum(exponential, LEAST))

    def fold_in(self, i: ArrayLike) -> Recorded:
        """See Noise."""
        return Recorded(self.arrays, (*self.index, i))

    def _read(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self.arrays:
            raise UsageError(
                f"No noise {name!r} was recorded, only {', '.join(sorted(self.arrays)) or 'none'}; record it."
            )
        array, depth = jnp.asarray(self.arrays[name]), len(self.index)
        if array.shape[depth:] != tuple(shape) or array.ndim < depth:
            wanted = ", ".join(["steps"] * depth + [str(size) for size in shape])
            raise UsageError(f"Recorded noise {name!r} has shape {list(array.shape)}; it must be [{wanted}].")
        return array.at[self.index].get(mode="fill", fill_value=jnp.nan) if self.index else array
