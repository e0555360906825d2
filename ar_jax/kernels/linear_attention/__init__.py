"""Linear attention: a matrix-valued memory that decays and is read by queries."""

from __future__ import annotations

from jax import Array

from ar_jax.config import nearest
from ar_jax.kernels.linear_attention.reference import reference
from ar_jax.kernels.linear_attention.xla import xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla}


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None = None,
    initial_state: Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Causal linear attention with decay (arXiv:2006.16236 without, arXiv:2307.08621 with).

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T;   o_t = S_t^T q_t

    Args:
      q: [B, T, N, H], with its feature map and scale applied.
      k: [B, T, N, H], likewise.
      v: [B, T, N, E].
      log_decay: [N] or [B, T, N] float32, in nats per token, <= 0; None does not decay.
      initial_state: [B, N, H, E] float32, the memory before the first token; zeros if None.
      chunk_size: the length over which the fast form works quadratically; None chooses.
      implementation: a key of IMPLEMENTATIONS; None chooses.

    Returns:
      o [B, T, N, E] in v's dtype, and the memory after the last token, [B, N, H, E] float32.

    Raises:
      ValueError: shapes that do not fit one another, or an unknown implementation.

    Cost: O(B T N H E) FLOPs; the state does not grow with T.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} should be [B, T, N, H], [B, T, N, H], [B, T, N, E]")
    if log_decay is not None and log_decay.shape not in ((q.shape[2],), q.shape[:3]):
        raise ValueError(f"log_decay {log_decay.shape} should be [{q.shape[2]}] or {list(q.shape[:3])}")
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"linear_attention has no implementation {name!r}.{nearest(name, IMPLEMENTATIONS)} Known: {', '.join(IMPLEMENTATIONS)}."
        )
    options = {} if name == "reference" else {"chunk_size": chunk_size}
    return IMPLEMENTATIONS[name](q, k, v, log_decay=log_decay, initial_state=initial_state, **options)
