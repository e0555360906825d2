"""Linear attention: a matrix-valued memory that decays and is read by queries."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ar_jax.kernels import passing
from ar_jax.kernels.dispatch import choose_form, filled_length, on_each_device, sequence_axis
from ar_jax.kernels.linear_attention.bidirectional import bidirectional_linear_attention, divided
from ar_jax.kernels.linear_attention.decay import NOTHING_LEFT
from ar_jax.kernels.linear_attention.pallas_gpu import pallas_gpu
from ar_jax.kernels.linear_attention.pallas_tpu import pallas_tpu
from ar_jax.kernels.linear_attention.reference import reference
from ar_jax.kernels.linear_attention.xla import xla

__all__ = ["FORMS", "bidirectional_linear_attention", "linear_attention", "linear_attention_step"]

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None = None,
    bonus: Array | None = None,
    initial_state: Array | None = None,
    normalize: bool = False,
    epsilon: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Causal linear attention (arXiv:2006.16236), with a decay per head (arXiv:2307.08621), step, or channel (arXiv:2312.06635).

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T;   o_t = S_t^T q_t

    With a bonus (arXiv:2404.05892) the query comes before the decay, and weighs its own token's channels anew:

    o_t = (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t

    Args:
      q: [B, T, N, H], with its feature map and scale applied.
      k: [B, T, N, H], likewise.
      v: [B, T, N, E].
      log_decay: [N], [B, T, N] or [B, T, N, H], in nats per token, <= 0; None does not decay. Below -104 nothing is left.
      bonus: [N, H]; None reads after the write.
      initial_state: [B, N, H, E], the memory before the first token; zeros if None. With normalize E + 1 columns.
      normalize: divide o_t by q_t . z_t, where z decays and sums the keys as S does their products with values.
      epsilon: added to q_t . z_t, as published code does; None adds nothing, but keeps it from zero.
      chunk_size: the length over which the fast forms work quadratically, a power of two; None chooses.
      implementation: a key of FORMS; None takes the platform's.

    Returns:
      o [B, T, N, E] in v's dtype, and the memory after the last token, [B, N, H, E] float32. With normalize z is its last
      column, [B, N, H, E + 1].

    Raises:
      ValueError: shapes that do not fit one another, a chunk size that is no power of two, or an implementation that is
        unknown or not for this platform.

    Cost: O(B T N H E) FLOPs; the state does not grow with T.
    """
    if q.ndim != 4 or v.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} should be [B, T, N, H], [B, T, N, H], [B, T, N, E]")
    if log_decay is not None and log_decay.shape not in ((q.shape[2],), q.shape[:3], q.shape):
        raise ValueError(
            f"log_decay {log_decay.shape} should be [N], [B, T, N] or [B, T, N, H], where q is [B, T, N, H] = {q.shape}"
        )
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size {chunk_size} should be a power of two")
    if normalize:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if log_decay is not None and log_decay.ndim == 1 and filled_length(q.shape[1]) > q.shape[1]:
        log_decay = jnp.broadcast_to(log_decay, q.shape[:3])  # what is filled up does not decay
    arrays = {"q": q, "k": k, "v": v, "log_decay": _clipped(log_decay), "bonus": _bonus(bonus, q)}
    arrays["initial_state"] = _state(initial_state, q[:, 0], v[:, 0])
    form = choose_form("linear_attention", FORMS, implementation, "reference" if q.shape[1] == 1 else None)
    axis = sequence_axis(q.shape[1])
    if axis is None and form in (reference, xla):  # the compiler cuts these by itself
        out, state = form(**arrays, chunk_size=chunk_size)
    else:
        form = form if axis is None else passing.linear(form, axis)
        tokens, memory = ("batch", "sequence", "heads", None), ("batch", "heads", None, None)
        axes = {name: x if x is None else tokens[: x.ndim] for name, x in arrays.items()}
        axes["initial_state"] = memory
        axes["bonus"] = None if bonus is None else ("heads", None)
        if log_decay is not None and log_decay.ndim == 1:
            axes["log_decay"] = ("heads",)
        out, state = on_each_device(lambda own: form(**own, chunk_size=chunk_size), arrays, axes, (tokens, memory))
        out = out[:, : q.shape[1]]
    return divided(out[..., :-1], out[..., -1:], epsilon) if normalize else out, state


def linear_attention_step(
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    *,
    log_decay: Array | None = None,
    bonus: Array | None = None,
    normalize: bool = False,
    epsilon: float | None = None,
) -> tuple[Array, Array]:
    """One token of `linear_attention`, for decoding.

    Args:
      q: [B, N, H].
      k: [B, N, H].
      v: [B, N, E].
      state: [B, N, H, E], the memory before the token; with normalize E + 1 columns.
      log_decay: [N], [B, N] or [B, N, H]; None does not decay.
      bonus: [N, H], or None.
      normalize: as in `linear_attention`.
      epsilon: as there.

    Returns:
      o [B, N, E] in v's dtype, and the memory after the token, float32.

    Raises:
      ValueError: shapes that do not fit one another.
    """
    if q.ndim != 3 or v.ndim != 3 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} should be [B, N, H], [B, N, H], [B, N, E]")
    if log_decay is not None and log_decay.shape not in (q.shape[1:2], q.shape[:2], q.shape):
        raise ValueError(
            f"log_decay {log_decay.shape} should be [N], [B, N] or [B, N, H], where q is [B, N, H] = {q.shape}"
        )
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay[:, None]
    out, state = linear_attention(
        q[:, None],
        k[:, None],
        v[:, None],
        log_decay=log_decay,
        bonus=bonus,
        initial_state=state,
        normalize=normalize,
        epsilon=epsilon,
    )
    return out[:, 0], state


def _clipped(log_decay: Array | None) -> Array | None:
    return None if log_decay is None else jnp.maximum(log_decay.astype(jnp.float32), NOTHING_LEFT)


def _bonus(bonus: Array | None, q: Array) -> Array | None:
    if bonus is not None and bonus.shape != q.shape[2:]:
        raise ValueError(f"bonus {bonus.shape} should be [N, H] = {q.shape[2:]}")
    return None if bonus is None else bonus.astype(jnp.float32)


def _state(initial_state: Array | None, q: Array, v: Array) -> Array:
    """The memory before the first token, for q [B, N, H] and v [B, N, E]."""
    expected = (*q.shape, v.shape[2])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state {initial_state.shape} should be [B, N, H, E] = {expected}")
    return jnp.zeros(expected, jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
