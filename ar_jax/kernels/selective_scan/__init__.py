"""The selective scan: a small diagonal state for each channel, whose decay, input and reading follow the token (Mamba)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ar_jax.kernels import passing
from ar_jax.kernels.dispatch import choose_form, on_each_device, sequence_axis
from ar_jax.kernels.selective_scan.pallas_gpu import pallas_gpu
from ar_jax.kernels.selective_scan.pallas_tpu import pallas_tpu
from ar_jax.kernels.selective_scan.reference import reference
from ar_jax.kernels.selective_scan.xla import xla

__all__ = ["FORMS", "selective_scan", "selective_scan_step"]

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def selective_scan(
    x: Array,
    delta: Array,
    a: Array,
    b: Array,
    c: Array,
    *,
    skip: Array | None = None,
    initial_state: Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """A diagonal state space whose step, input and output matrices follow the token (arXiv:2312.00752, alg. 2).

    h_t = exp(delta_t a) h_{t-1} + delta_t x_t b_t;   y_t = c_t . h_t + skip x_t        for each channel, h_t in R^S

    Like the official code, a is discretised exactly and b by Euler's rule.

    Args:
      x: [B, T, D].
      delta: [B, T, D], the step sizes, > 0: bias and softplus are the caller's.
      a: [D, S], the rates, < 0.
      b: [B, T, S], or [B, T, G, S] where each of G groups serves D / G neighbouring channels.
      c: likewise.
      skip: [D]; None adds nothing.
      initial_state: [B, D, S], the state before the first token; zeros if None.
      chunk_size: how many tokens' states backward computes anew at a time; None chooses.
      implementation: a key of FORMS; None takes the platform's.

    Returns:
      y [B, T, D] in x's dtype, and the state after the last token, [B, D, S] float32.

    Raises:
      ValueError: shapes that do not fit one another, or an implementation that is unknown or not for this platform.

    Cost: O(B T D S) FLOPs; the state does not grow with T.
    """
    b, c = (s[:, :, None] if s.ndim == 3 else s for s in (b, c))
    _check(x, delta, a, b, c, skip, initial_state, chunk_size)
    batch, length, channels = x.shape
    start = jnp.zeros((batch, *a.shape), jnp.float32) if initial_state is None else initial_state
    arrays = {"x": x, "delta": delta, "a": a, "b": b, "c": c, "initial_state": start.astype(jnp.float32)}
    # A single token is a step, which the equation itself takes fastest.
    form = choose_form("selective_scan", FORMS, implementation or ("reference" if length == 1 else None))
    axis = sequence_axis(length)
    if axis is None and form in (reference, xla):  # the compiler cuts these by itself
        y, state = form(**arrays, chunk_size=chunk_size)
    else:
        form = form if axis is None else passing.scan(form, axis)
        by_token, memory = ("batch", "sequence", None), ("batch", None, None)
        axes = {"x": by_token, "delta": by_token, "a": (None, None), "initial_state": memory}
        axes["b"] = axes["c"] = (*by_token, None)
        y, state = on_each_device(lambda own: form(**own, chunk_size=chunk_size), arrays, axes, (by_token, memory))
        y = y[:, :length]
    if skip is not None:
        y = (y.astype(jnp.float32) + skip.astype(jnp.float32)[None, None] * x.astype(jnp.float32)).astype(x.dtype)
    return y, state


def selective_scan_step(
    x: Array, delta: Array, a: Array, b: Array, c: Array, state: Array, *, skip: Array | None = None
) -> tuple[Array, Array]:
    """One token of `selective_scan`, for decoding.

    Args:
      x: [B, D].
      delta: [B, D].
      a: [D, S].
      b: [B, S] or [B, G, S].
      c: likewise.
      state: [B, D, S], the state before the token.
      skip: [D] or None.

    Returns:
      y [B, D] in x's dtype, and the state after the token, float32.

    Raises:
      ValueError: shapes that do not fit one another.
    """
    x, delta, b, c = (s[:, None] for s in (x, delta, b, c))
    y, state = selective_scan(x, delta, a, b, c, skip=skip, initial_state=state, implementation="reference")
    return y[:, 0], state


def _check(
    x: Array,
    delta: Array,
    a: Array,
    b: Array,
    c: Array,
    skip: Array | None,
    initial_state: Array | None,
    chunk_size: int | None,
) -> None:
    if x.ndim != 3 or delta.shape != x.shape:
        raise ValueError(f"x {x.shape} and delta {delta.shape} should both be [B, T, D]")
    batch, length, channels = x.shape
    if a.ndim != 2 or a.shape[0] != channels:
        raise ValueError(f"a {a.shape} should be [D, S] with D = {channels}")
    if b.ndim != 4 or b.shape != c.shape or b.shape[:2] != (batch, length) or b.shape[3] != a.shape[1]:
        raise ValueError(
            f"b {b.shape} and c {c.shape} should both be [B, T, S] or [B, T, G, S] with "
            f"B, T, S = {(batch, length, a.shape[1])}"
        )
    if channels % b.shape[2]:
        raise ValueError(f"the {b.shape[2]} groups of b and c should divide the {channels} channels of x")
    if skip is not None and skip.shape != (channels,):
        raise ValueError(f"skip {skip.shape} should be [D] = {(channels,)}")
    if initial_state is not None and initial_state.shape != (batch, *a.shape):
        raise ValueError(f"initial_state {initial_state.shape} should be [B, D, S] = {(batch, *a.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} should be at least 1")
