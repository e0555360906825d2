"""Mixing by Fourier transforms: of whole sequences (FNet, arXiv:2105.03824), and of samples of the past (FNetAR, 2107.10932)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.mixers.common.line import line_index, present
from ar_jax.mixers.common.place_order import in_place_order
from ar_jax.mixers.common.short_convolution import Ring, empty_ring, short_convolution
from ar_jax.mixers.protocol import NEVER, Tokens, segment_starts


class FNet(nn.Module):
    """y = Re F_time(F_channels(x)), without a parameter; the transforms are not normalised.

    The causal form (FNetAR) transforms, for each token, samples of its past that lie `stride` tokens apart, itself first,
    and keeps the frequency of its own index: y_t = Re sum_{j<samples} exp(-2 pi i t j / samples) F_channels(x_{t - j stride}).

    Attributes:
      causal: FNetAR; otherwise FNet, which reads the whole sequence.
      num_samples: causal only: how many tokens are read.
      stride: causal only: their distance.
      unitary: the transforms keep lengths: divided by the square root of the channels and of the tokens that are read.
    """

    embed_dim: int
    causal: bool = True
    num_samples: int = 16
    stride: int = 1
    unitary: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def reads_peers(self) -> bool:
        """FNet reads everything."""
        return not self.causal

    def setup(self) -> None:
        """Nothing is learned."""
        for name in ("num_samples", "stride"):
            least = 2 if name == "num_samples" else 1
            if getattr(self, name) < least:
                raise UsageError(f"config.model.mixer.{name}={getattr(self, name)} must be at least {least}.")

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Ring | tuple[()]:
        """See Mixer: the transformed channels of the last tokens, the real parts and the imaginary ones."""
        if not self.causal:
            return ()
        return empty_ring(batch_size, self.num_samples, 2 * self.embed_dim, jnp.float32, self.stride)

    def __call__(self, x: Array, tokens: Tokens, state: Ring | None = None) -> tuple[Array, Ring | None]:
        """See Mixer."""
        scale = self.embed_dim**-0.5 if self.unitary else 1.0
        channels = jnp.fft.fft(present(x.astype(jnp.float32) * scale, tokens), axis=-1)
        parts = jnp.concatenate([channels.real, channels.imag], axis=-1)
        if self.causal:
            mixed, state = self._of_samples(parts, tokens, state)
        else:
            mixed = in_place_order(self._of_whole, parts, tokens)
        return mixed.astype(self.dtype), state

    def _of_samples(self, parts: Array, tokens: Tokens, state: Ring | None) -> tuple[Array, Ring | None]:
        """[B, T, 2 D] real and imaginary parts to [B, T, D]."""
        count = self.num_samples
        frequency = line_index(tokens, 0 if state is None else state.count) % count
        turns = (frequency[..., None] * jnp.arange(count)[None, None]) % count
        angle = turns.astype(jnp.float32) * (2 * math.pi / count)
        filters = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)  # of Re (a + ib) exp(-i angle)
        if self.unitary:
            filters *= count**-0.5
        mixed, state = short_convolution(parts, filters, tokens, state, self.stride)
        return mixed[..., : self.embed_dim] + mixed[..., self.embed_dim :], state

    def _of_whole(self, parts: Array, tokens: Tokens) -> Array:
        """[B, T, 2 D] real and imaginary parts to [B, T, D]."""
        x = jax.lax.complex(parts[..., : self.embed_dim], parts[..., self.embed_dim :])
        length = jnp.full((1, 1), x.shape[1])
        if tokens.segment is not None:
            mixed, length = transform_of_segments(x, tokens)
        elif tokens.padded:
            length = (tokens.step < NEVER).sum(axis=1)[:, None]
            mixed = transform_of_length(x, length)
        else:
            mixed = jnp.fft.fft(x, axis=1)
        return mixed.real * (jax.lax.rsqrt(length.astype(jnp.float32))[..., None] if self.unitary else 1.0)


def transform_of_length(x: Array, length: Array) -> Array:
    """The Fourier transform of the first tokens of x, as many as the data tells (Bluestein's algorithm).

    Args:
      x: [B, T, D] complex, zeros behind them.
      length: [B or 1, 1] int32, at least 1 is taken.

    Returns:
      [B, T, D] complex, zeros behind them. Cost: O(B D T log T).
    """
    size = x.shape[1]
    index, length = jnp.arange(size, dtype=jnp.uint32)[None], jnp.maximum(length, 1)
    period = 2 * length.astype(jnp.uint32)
    # index^2 mod period, in parts that 32 bits hold
    square = ((index * (index >> 8)) % period * 256 + index * (index & 255) % period) % period
    angle = square.astype(jnp.float32) * (math.pi / length.astype(jnp.float32))
    chirp = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))  # exp(i pi index^2 / length)
    around = 2 * size
    mirrored = jnp.concatenate([chirp, jnp.zeros_like(chirp[:, :1]), chirp[:, :0:-1]], axis=1)
    spectrum = jnp.fft.fft(x * chirp.conj()[..., None], n=around, axis=1) * jnp.fft.fft(mirrored, axis=1)[..., None]
    mixed = jnp.fft.ifft(spectrum, axis=1)[:, :size] * chirp.conj()[..., None]
    return jnp.where((index < length.astype(jnp.uint32))[..., None], mixed, 0)


def transform_of_segments(x: Array, tokens: Tokens) -> tuple[Array, Array]:
    """The Fourier transform of each of several packed sequences, [B, T, D], and their lengths [B or 1, T].

    Each has a matrix of its own: O(B T^2) numbers, where one sequence needs none.
    """
    segment = jnp.asarray(tokens.segment)
    index = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    start = jax.lax.cummax(jnp.where(segment_starts(segment), index, 0), axis=1)
    place = index - start
    together = (segment[:, :, None] == segment[:, None, :]) & (tokens.step < NEVER)[:, None, :]
    length = jnp.maximum(together.sum(axis=-1, dtype=jnp.int32), 1)
    turns = (place[:, :, None] * place[:, None, :]) % length[..., None]
    angle = turns.astype(jnp.float32) * (2 * math.pi / length.astype(jnp.float32))[..., None]
    matrix = jnp.where(together, jax.lax.complex(jnp.cos(angle), -jnp.sin(angle)), 0)
    equation = "ts,bsd->btd" if len(matrix) == 1 else "bts,bsd->btd"
    return jnp.einsum(equation, matrix[0] if len(matrix) == 1 else matrix, x), length
