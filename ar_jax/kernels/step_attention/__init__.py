"""Softmax attention whose mask is data: who may read whom follows from the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.dispatch import choose_form, on_each_device
from ar_jax.kernels.step_attention.merge import merge
from ar_jax.kernels.step_attention.pallas_gpu import pallas_gpu
from ar_jax.kernels.step_attention.pallas_tpu import pallas_tpu
from ar_jax.kernels.step_attention.reference import reference
from ar_jax.kernels.step_attention.visibility import Visibility, visibility
from ar_jax.kernels.step_attention.xla import xla

__all__ = ["FORMS", "Visibility", "merge", "step_attention", "visibility"]

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def step_attention(
    q: Array,
    k: Array,
    v: Array,
    query_step: Array,
    key_step: Array,
    *,
    strict: bool = False,
    window: int | None = None,
    query_segment: Array | None = None,
    key_segment: Array | None = None,
    query_position: Array | None = None,
    key_position: Array | None = None,
    reach: Sequence[tuple[int, int]] | None = None,
    bias: Array | None = None,
    sinks: Array | None = None,
    logit_soft_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention in which a query reads the keys of the same and of earlier steps (arXiv:1706.03762, 2205.14135).

    o_i = sum_j p_ij v_j,   p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij)),   s_ij = cap tanh(scale q_i . k_j / cap) + bias_ij

    over all keys j that are visible to query i: those with
    key_step_j <= query_step_i (< if strict), query_step_i - key_step_j < window, the same segment, and within reach:
    -after <= query_position_i - key_position_j <= before in each axis. What is not given does not restrict. Raster,
    random, next-scale, block, masked, prefix and packed sequences differ in these numbers alone.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H], where N is a multiple of K: query heads share key heads in groups (arXiv:2305.13245).
      v: [B, S, K, H].
      query_step: [T] or [B or 1, T] int32.
      key_step: [S] or [B or 1, S] int32; a key whose step is larger than every query's is never read.
      strict: a query reads earlier steps only.
      window: only the last so many steps are read, the query's own among them.
      query_segment: [T] or [B or 1, T] int32, which of several packed sequences a query belongs to.
      key_segment: [S] or [B or 1, S] int32.
      query_position: [T, D] or [B or 1, T, D] int32, the centre of a query's neighbourhood.
      key_position: [S, D] or [B or 1, S, D] int32.
      reach: (before, after) of each of the D axes.
      bias: [B or 1, N, T, S], added to the logits.
      sinks: [N], a logit per head that takes part in the softmax and has no value (arXiv:2309.17453).
      logit_soft_cap: keeps logits within +-cap (arXiv:2408.00118).
      scale: 1 / sqrt(H) if None.
      return_lse: also return the log-sum-exp of the logits, sink included: what `merge` needs.
      implementation: a key of FORMS; None takes the platform's.

    Returns:
      [B, T, N, H] in v's dtype, zeros where a query reads nothing; with return_lse also [B, T, N] float32, -1e30 there.

    Raises:
      ValueError: shapes that do not fit one another, or an implementation that is unknown or not for this platform.
    """
    _check_arrays(q, k, v, bias, sinks)
    lengths = {"query": q.shape[1], "key": k.shape[1]}
    steps = [
        _row(f"{side}_step", step, q.shape[0], n, 1)
        for (side, n), step in zip(lengths.items(), (query_step, key_step), strict=True)
    ]
    segments = _pair("segment", query_segment, key_segment, q.shape[0], lengths, 1)
    positions = _pair("position", query_position, key_position, q.shape[0], lengths, 2)
    if (reach is None) != (positions[0] is None) or any(
        p is not None and p.shape[2] != len(reach or ()) for p in positions
    ):
        raise ValueError(
            f"reach {reach} should have a pair for each axis of query_position and key_position, or all be None"
        )
    visible = visibility(
        *steps,
        strict=strict,
        window=window,
        query_segment=segments[0],
        key_segment=segments[1],
        query_position=positions[0],
        key_position=positions[1],
        reach=reach,
    )
    form = choose_form("step_attention", FORMS, implementation)
    numbers = {"scale": q.shape[3] ** -0.5 if scale is None else float(scale), "soft_cap": logit_soft_cap}
    arrays = {"q": q, "k": k, "v": v, "visible": visible, "bias": bias, "sinks": sinks}
    if form in (reference, xla):  # the compiler cuts these by itself
        out, lse = form(**arrays, **numbers)
    else:
        out, lse = on_each_device(lambda own: form(**own, **numbers), arrays, _axes(arrays), (_QUERIES, _QUERIES[:3]))
    return (out, lse) if return_lse else out


_QUERIES = ("batch", "sequence", "heads", None)  # each device answers its own queries from all the keys
_KEYS = ("batch", None, "heads", None)


def _axes(arrays: dict[str, Any]) -> dict[str, Any]:
    """The kinds of each array's axes, for `on_each_device`."""
    row = ("batch", None, "sequence")
    axes: dict[str, Any] = {"q": _QUERIES, "k": _KEYS, "v": _KEYS}
    axes["visible"] = arrays["visible"].replace(lower=row, upper=row, key=("batch", None, None))
    axes["bias"] = None if arrays["bias"] is None else ("batch", "heads", "sequence", None)
    axes["sinks"] = None if arrays["sinks"] is None else ("heads",)
    return axes


def _check_arrays(q: Array, k: Array, v: Array, bias: Array | None, sinks: Array | None) -> None:
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
    batch, length, heads, _ = q.shape
    if bias is not None and (
        bias.ndim != 4 or bias.shape[0] not in (1, batch) or bias.shape[1:] != (heads, length, k.shape[1])
    ):
        raise ValueError(f"bias {bias.shape} should be [{batch} or 1, {heads}, {length}, {k.shape[1]}]")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks {sinks.shape} should be [{heads}], a logit for each head")


def _pair(
    name: str, query: Array | None, key: Array | None, batch: int, lengths: dict[str, int], ndim: int
) -> tuple[Array, Array] | tuple[None, None]:
    if query is None and key is None:
        return None, None
    if query is None or key is None:
        raise ValueError(f"query_{name} and key_{name} belong together; give both or neither")
    return (
        _row(f"query_{name}", query, batch, lengths["query"], ndim),
        _row(f"key_{name}", key, batch, lengths["key"], ndim),
    )


def _row(name: str, a: Array, batch: int, length: int, ndim: int) -> Array:
    """[B or 1, length, ...]."""
    a = jnp.asarray(a)
    full = a[None] if a.ndim == ndim else a
    if full.ndim != ndim + 1 or full.shape[0] not in (1, batch) or full.shape[1] != length or a.dtype.kind != "i":
        more = ", D" if ndim == 2 else ""
        raise ValueError(
            f"{name} {a.shape} {a.dtype} should be int32 [{batch} or 1, {length}{more}] or [{length}{more}]"
        )
    return full
