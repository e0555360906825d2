"""Convolution over all of the past by a sum of decaying powers, which is a diagonal state space (arXiv:2203.14343)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.mixers.common.line import line_index, present, stands_behind
from ar_jax.mixers.common.short_convolution import Ring, last_values
from ar_jax.mixers.protocol import Tokens, segment_starts, take

STEPWISE = 4  # pieces so short are walked token by token; longer ones are transformed


def powers(log_decay: Array, weight: Array, length: int) -> Array:
    """The kernel: K_l = Re sum_n weight_n exp(l log_decay_n) for l < length, [length, C] float32.

    Args:
      log_decay: [C or 1, N], real or complex.
      weight: [C, N], likewise.
      length: of the kernel.
    """
    lag = jnp.arange(length, dtype=jnp.float32)[:, None, None]
    decayed = jnp.exp(lag * log_decay[None])
    if len(log_decay) == 1:
        return jnp.einsum("ln,cn->lc", decayed[:, 0], weight).real
    return jnp.einsum("lcn,cn->lc", decayed, weight).real


def convolve(values: Array, kernel: Array) -> Array:
    """out_t = sum_{j <= t} kernel_j values_{t-j} by Fourier transforms: [B, T, C] and [T, C] to [B, T, C]. O(T log T)."""
    length = values.shape[1]
    spectra = jnp.fft.rfft(values, 2 * length, axis=1) * jnp.fft.rfft(kernel, 2 * length, axis=0)[None]
    return jnp.fft.irfft(spectra, 2 * length, axis=1)[:, :length]


def long_convolution(
    values: Array, log_decay: Array, weight: Array, tokens: Tokens, before: Array | None
) -> tuple[Array, Array | None]:
    """y_t = Re sum_n weight_n h_tn,   h_t = exp(log_decay) h_{t-1} + x_t, channel by channel.

    Whole sequences by Fourier transforms, single tokens and packed segments by the recurrence. A query (a token that is not
    remembered) stands behind the tokens that it may read.

    Args:
      values: x, [B, T, C], as fed.
      log_decay: [C or 1, N], real or complex, of a real part <= 0.
      weight: [C, N], likewise.
      tokens: when and where they are.
      before: h, [B, C, N] float32 or complex64, before them; None for a whole sequence.

    Returns:
      y [B, T, C] float32, and h after them, None without one before. The state does not grow with T.
    """
    n = tokens.num_remembered
    values = present(values.astype(jnp.float32), tokens)
    line = values[:, :n]
    walks = n <= STEPWISE or tokens.segment is not None
    read, ahead, after = (_walked if walks else _transformed)(line, log_decay, weight, tokens, before)
    if n < values.shape[1]:
        # What a token would read of the past that stands behind so many remembered ones, and of itself.
        past = take(ahead, stands_behind(tokens)) + weight.sum(axis=-1).real[None, None] * values[:, n:]
        read = jnp.concatenate([read, past], axis=1)
    return read, None if before is None else after


def _walked(
    line: Array, log_decay: Array, weight: Array, tokens: Tokens, before: Array | None
) -> tuple[Array, Array, Array]:
    """The remembered tokens' outputs [B, n, C], the past as the next token reads it [B, n + 1, C], and the state after."""
    batch, n, channels = line.shape
    decay = jnp.exp(log_decay)[None]
    start = jnp.zeros((batch, channels, weight.shape[1]), weight.dtype) if before is None else before
    first = jnp.zeros((1, n), bool) if tokens.segment is None else segment_starts(tokens.segment[:, :n])

    def read(h: Array) -> Array:
        return (h * weight[None]).sum(axis=-1).real

    def step(h: Array, fed: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        x, starts = fed
        h = decay * jnp.where(starts[:, None, None], 0, h) + x[..., None]
        return h, (read(h), read(decay * h))

    after, (out, ahead) = jax.lax.scan(step, start, (jnp.swapaxes(line, 0, 1), first.T))
    ahead = jnp.concatenate([read(decay * start)[None], ahead])
    if tokens.segment is not None:  # a query that stands behind nothing of its own reads nothing
        ahead = ahead.at[0].set(0)
    return jnp.swapaxes(out, 0, 1), jnp.swapaxes(ahead, 0, 1), after


def _transformed(
    line: Array, log_decay: Array, weight: Array, tokens: Tokens, before: Array | None
) -> tuple[Array, Array, Array | None]:
    """See _walked; nothing is returned for what nobody asks."""
    batch, n, channels = line.shape
    kernel = powers(log_decay, weight, n + 1)
    out, ahead = convolve(line, kernel[:n]), jnp.zeros((batch, n + 1, channels))
    if tokens.num_remembered < tokens.step.shape[1]:
        ahead = ahead.at[:, 1:].set(convolve(line, kernel[1:]))
    if before is None:
        return out, ahead, None
    lag = jnp.arange(n + 2, dtype=jnp.float32)[:, None, None]
    decayed = jnp.exp(lag * log_decay[None])  # [n + 2, C or 1, N]
    equation = "bcn,tn->btc" if len(log_decay) == 1 else "bcn,tcn->btc"
    faded = jnp.einsum(equation, before * weight[None], decayed[:, 0] if len(log_decay) == 1 else decayed).real
    backwards = decayed[:n][::-1]
    equation = "btc,tn->bcn" if len(log_decay) == 1 else "btc,tcn->bcn"
    new = jnp.einsum(equation, line.astype(weight.dtype), backwards[:, 0] if len(log_decay) == 1 else backwards)
    return out + faded[:, 1 : n + 1], ahead + faded[:, 1:], decayed[n][None] * before + new


def finite_convolution(values: Array, filters: Array, tokens: Tokens, before: Ring | None) -> tuple[Array, Ring | None]:
    """`short_convolution` with long filters: whole sequences by Fourier transforms, pieces tap by tap.

    Args:
      values: [B, T, C], as fed.
      filters: [width, C], the present token's first.
      tokens: when and where they are.
      before: the state before them; None for a whole sequence.

    Returns:
      [B, T, C] float32, and the state after them.
    """
    width, length = len(filters), values.shape[1]
    filters = filters.astype(jnp.float32)
    if before is None and tokens.segment is None and tokens.num_remembered == length:
        kernel = jnp.pad(filters[:length], ((0, max(length - width, 0)), (0, 0)))
        return convolve(present(values.astype(jnp.float32), tokens), kernel), None
    index = line_index(tokens, 0 if before is None else before.count)
    taps, after = last_values(values, width, tokens, before)
    own = jnp.arange(width)[None, None] <= index[..., None]  # what is further away is of another segment
    taps = jnp.where(own[..., None], taps.astype(jnp.float32), 0)
    return jnp.einsum("btwc,wc->btc", taps, filters), after
