"""Delta rules: a matrix-valued memory that reads what it holds under a key before it writes there."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ar_jax.kernels import passing
from ar_jax.kernels.delta_attention import pallas_gpu, pallas_tpu, pallas_tpu_dplr, reference, xla
from ar_jax.kernels.dispatch import choose_form, on_each_device, sequence_axis

__all__ = ["DPLR_FORMS", "FORMS", "delta_attention", "delta_attention_step", "dplr_attention", "dplr_attention_step"]

FORMS = {
    "reference": reference.delta,
    "xla": xla.delta,
    "pallas_tpu": pallas_tpu.delta,
    "pallas_gpu": pallas_gpu.delta,
}
DPLR_FORMS = {
    "reference": reference.dplr,
    "xla": xla.dplr,
    "pallas_tpu": pallas_tpu_dplr.dplr,
    "pallas_gpu": pallas_gpu.dplr,
}


def delta_attention(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    log_decay: Array | None = None,
    initial_state: Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The delta rule (arXiv:2406.06484), gated (arXiv:2412.06464), and with a gate per channel (arXiv:2510.26692).

    S'_t = exp(log_decay_t) S_{t-1};   S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T;   o_t = S_t^T q_t

    With |k_t| = 1 and beta_t = 1 the memory answers k_t with v_t from then on; beta_t = 0 leaves it as it is.

    Args:
      q: [B, T, N, H], with its scale applied.
      k: [B, T, N, H]; the memory stays bounded where beta_t |k_t|^2 < 2, so keys are usually normalised.
      v: [B, T, N, E].
      beta: [B, T, N], how much of the difference is written.
      log_decay: [N], [B, T, N] or [B, T, N, H], in nats per token, <= 0; None does not decay.
      initial_state: [B, N, H, E], the memory before the first token; zeros if None.
      chunk_size: the length over which the fast forms work quadratically, a power of two; None chooses.
      implementation: a key of FORMS; None takes the platform's.

    Returns:
      o [B, T, N, E] in v's dtype, and the memory after the last token, [B, N, H, E] float32.

    Raises:
      ValueError: shapes that do not fit one another, a chunk size that is no power of two, or an implementation that is
        unknown or not for this platform.

    Cost: O(B T N H E) FLOPs; the state does not grow with T.
    """
    _check(q, k, v, initial_state, chunk_size)
    if beta.shape != q.shape[:3]:
        raise ValueError(f"beta {beta.shape} should be [B, T, N] = {q.shape[:3]}")
    if log_decay is not None and log_decay.shape not in ((q.shape[2],), q.shape[:3], q.shape):
        raise ValueError(
            f"log_decay {log_decay.shape} should be [N], [B, T, N] or [B, T, N, H], where q is [B, T, N, H] = {q.shape}"
        )
    if log_decay is not None and log_decay.ndim == 4:
        amount = beta.astype(jnp.float32)[..., None] * k
        decayed = jnp.exp(log_decay.astype(jnp.float32)) * k
        written, erased, decayed = (x.astype(k.dtype) for x in (amount, -amount, decayed))
        return dplr_attention(
            q,
            written,
            v,
            decayed,
            erased,
            log_decay=log_decay,
            initial_state=initial_state,
            chunk_size=chunk_size,
            implementation=implementation,
        )
    decay = jnp.zeros(q.shape[:3], jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    decay = jnp.broadcast_to(decay[None, None] if decay.ndim == 1 else decay, q.shape[:3])
    arrays = {"q": q, "k": k, "v": v, "beta": beta.astype(jnp.float32), "log_decay": decay}
    default = "reference" if q.shape[1] == 1 else None
    return _run("delta_attention", FORMS, arrays, initial_state, chunk_size, implementation, default)


def dplr_attention(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    *,
    log_decay: Array,
    initial_state: Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """A memory whose transition is diagonal plus low rank, RWKV-7's (arXiv:2503.14456); delta rules are special cases.

    S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T;   o_t = S_t^T q_t

    RWKV-7 reads a removal key in a = -key and writes it back in b = key * in-context learning rate.

    Args:
      q: [B, T, N, H], with its scale applied.
      k: [B, T, N, H].
      v: [B, T, N, E].
      a: [B, T, N, H], what the memory before the token's own decay is read with.
      b: [B, T, N, H], where that is written.
      log_decay: [B, T, N, H], in nats per token, <= 0.
      initial_state: [B, N, H, E], the memory before the first token; zeros if None.
      chunk_size: the length over which the fast forms work quadratically, a power of two; None chooses.
      implementation: a key of DPLR_FORMS; None takes the platform's.

    Returns:
      o [B, T, N, E] in v's dtype, and the memory after the last token, [B, N, H, E] float32.

    Raises:
      ValueError: shapes that do not fit one another, a chunk size that is no power of two, or an implementation that is
        unknown or not for this platform.

    Cost: O(B T N H E) FLOPs; the state does not grow with T.
    """
    _check(q, k, v, initial_state, chunk_size)
    for name, array in {"a": a, "b": b, "log_decay": log_decay}.items():
        if array.shape != q.shape:
            raise ValueError(f"{name} {array.shape} should be [B, T, N, H] = {q.shape}")
    arrays = {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay.astype(jnp.float32)}
    default = "reference" if q.shape[1] == 1 else None
    return _run("dplr_attention", DPLR_FORMS, arrays, initial_state, chunk_size, implementation, default)


def delta_attention_step(
    q: Array, k: Array, v: Array, beta: Array, state: Array, *, log_decay: Array | None = None
) -> tuple[Array, Array]:
    """One token of `delta_attention`, for decoding.

    Args:
      q: [B, N, H].
      k: [B, N, H].
      v: [B, N, E].
      beta: [B, N].
      state: [B, N, H, E], the memory before the token.
      log_decay: [N], [B, N] or [B, N, H]; None does not decay.

    Returns:
      o [B, N, E] in v's dtype, and the memory after the token, float32.

    Raises:
      ValueError: shapes that do not fit one another.
    """
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay[:, None]
    arrays = (x[:, None] for x in (q, k, v, beta))
    out, state = delta_attention(*arrays, log_decay=log_decay, initial_state=state, implementation="reference")
    return out[:, 0], state


def dplr_attention_step(
    q: Array, k: Array, v: Array, a: Array, b: Array, state: Array, *, log_decay: Array
) -> tuple[Array, Array]:
    """One token of `dplr_attention`, for decoding.

    Args:
      q: [B, N, H].
      k: [B, N, H].
      v: [B, N, E].
      a: [B, N, H].
      b: [B, N, H].
      state: [B, N, H, E], the memory before the token.
      log_decay: [B, N, H].

    Returns:
      o [B, N, E] in v's dtype, and the memory after the token, float32.

    Raises:
      ValueError: shapes that do not fit one another.
    """
    arrays = (x[:, None] for x in (q, k, v, a, b))
    out, state = dplr_attention(*arrays, log_decay=log_decay[:, None], initial_state=state, implementation="reference")
    return out[:, 0], state


def _check(q: Array, k: Array, v: Array, initial_state: Array | None, chunk_size: int | None) -> None:
    if q.ndim != 4 or v.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} should be [B, T, N, H], [B, T, N, H], [B, T, N, E]")
    expected = (q.shape[0], *q.shape[2:], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state {initial_state.shape} should be [B, N, H, E] = {expected}")
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size {chunk_size} should be a power of two")


def _run(
    op: str,
    forms: dict[str, Any],
    arrays: dict[str, Array],
    initial_state: Array | None,
    chunk_size: int | None,
    implementation: str | None,
    default: str | None,
) -> tuple[Array, Array]:
    """The chosen form of these arrays; a single token is a step, which the equation itself takes fastest."""
    batch, length, heads, dim = arrays["q"].shape
    width = arrays["v"].shape[3]
    start = jnp.zeros((batch, heads, dim, width), jnp.float32) if initial_state is None else initial_state
    arrays = arrays | {"initial_state": start.astype(jnp.float32)}
    name = implementation or default
    form, axis = choose_form(op, forms, name), sequence_axis(length)
    if axis is None and form in (forms["reference"], forms["xla"]):  # the compiler cuts these by itself
        return form(**arrays, chunk_size=chunk_size)
    form = form if axis is None else passing.delta(form, axis)
    axes = {name: ("batch", "sequence", "heads", None)[: x.ndim] for name, x in arrays.items()}
    axes["initial_state"] = ("batch", "heads", None, None)
    out_axes = (axes["q"], axes["initial_state"])
    out, state = on_each_device(lambda own: form(**own, chunk_size=chunk_size), arrays, axes, out_axes)
    return out[:, :length], state
