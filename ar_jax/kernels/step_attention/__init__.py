"""Softmax attention whose mask is data: who may read whom follows from the steps."""

from __future__ import annotations

from jax import Array

from ar_jax.config import nearest
from ar_jax.kernels.step_attention.reference import reference

IMPLEMENTATIONS = {"reference": reference}


def step_attention(
    q: Array,
    k: Array,
    v: Array,
    query_step: Array,
    key_step: Array,
    *,
    window: int | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Softmax attention in which a query reads the keys of the same and of earlier steps.

    o_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j over all j with key_step_j <= query_step_i, and with a window
    query_step_i - key_step_j < window.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H], where N is a multiple of K: query heads share key heads in groups (arXiv:2305.13245).
      v: [B, S, K, H].
      query_step: [B or 1, T] int32.
      key_step: [B or 1, S] int32; a key whose step is larger than every query's is never read.
      window: only the last so many steps are read.
      bias: [B or 1, N, T, S], added to the logits.
      scale: 1 / sqrt(H) if None.
      implementation: a key of IMPLEMENTATIONS; None chooses.

    Returns:
      [B, T, N, H] in v's dtype; zeros where a query reads nothing.

    Raises:
      ValueError: shapes that do not fit one another, or an unknown implementation.
    """
    _check(q, k, v, query_step, key_step)
    name = implementation or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"step_attention has no implementation {name!r}.{nearest(name, IMPLEMENTATIONS)} Known: {', '.join(IMPLEMENTATIONS)}."
        )
    return IMPLEMENTATIONS[name](q, k, v, query_step, key_step, window=window, bias=bias, scale=scale)


def _check(q: Array, k: Array, v: Array, query_step: Array, key_step: Array) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[2] % k.shape[2]
    ):
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} should be [B, T, N, H], [B, S, K, H], [B, S, K, H] with N a multiple of K"
        )
    for name, step, length in (("query_step", query_step, q.shape[1]), ("key_step", key_step, k.shape[1])):
        if step.ndim != 2 or step.shape[0] not in (1, q.shape[0]) or step.shape[1] != length or step.dtype.kind != "i":
            raise ValueError(f"{name} {step.shape} {step.dtype} should be int32 [{q.shape[0]} or 1, {length}]")
