"""Softmax attention whose mask is data: who may read whom follows from the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.config import nearest
from ar_jax.kernels.dispatch import choose_form, filled_length, on_each_device, sequence_axis
from ar_jax.kernels.step_attention import pallas_gpu_backward, pallas_tpu_backward
from ar_jax.kernels.step_attention.gradient import backward_of
from ar_jax.kernels.step_attention.merge import merge
from ar_jax.kernels.step_attention.pallas_gpu import pallas_gpu
from ar_jax.kernels.step_attention.pallas_tpu import pallas_tpu
from ar_jax.kernels.step_attention.reference import reference
from ar_jax.kernels.step_attention.ring import ring
from ar_jax.kernels.step_attention.tree import tree
from ar_jax.kernels.step_attention.visibility import Visibility, visibility
from ar_jax.kernels.step_attention.xla import backward as xla_backward
from ar_jax.kernels.step_attention.xla import xla
from ar_jax.kernels.step_attention.zigzag import zigzag

__all__ = ["FORMS", "ROUTES", "Visibility", "merge", "step_attention", "visibility"]

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
BACKWARD = {
    reference: backward_of(reference),
    xla: xla_backward,
    pallas_tpu: pallas_tpu_backward.backward,
    pallas_gpu: pallas_gpu_backward.backward,
}
# Where sequences are cut over devices: the kinds of the axes of queries, and of keys, for `on_each_device`.
ROUTES = {
    "ring": ("sequence", "sequence"),
    "zigzag": ("sequence", "sequence"),
    "tree": (None, "sequence"),
    "gather": ("sequence", None),
}
# Queries of a device, two of the TPU kernel's blocks: of fewer, halves share a block, and none is left out.
LONG_PART = 2048


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
    across: str | None = None,
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
      across: how queries and keys come together where the mesh in use cuts sequences, a key of ROUTES: "ring" cuts both, and
        keys travel round (arXiv:2310.01889); "zigzag" is the ring after each device has got an early and a late part, so
        that none waits where later tokens read all earlier ones (arXiv:2407.21783); "tree" cuts the keys, and what each
        device has read is reduced (arXiv:2408.04093); "gather" cuts the queries, and each device has all keys. None takes
        the tree where queries are few, as in decoding, and "gather" where there are fewer than devices; else "zigzag" where
        each device has LONG_PART queries and neither window, reach nor bias is given, and "ring" where not.
      implementation: a key of FORMS; None takes the platform's.

    Returns:
      [B, T, N, H] in v's dtype, zeros where a query reads nothing; with return_lse also [B, T, N] float32, -1e30 there.

    Raises:
      ValueError: shapes that do not fit one another or the mesh, or an implementation that is unknown or not for this
        platform.
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
    route = _route(across, q, k, far=window is None and reach is None and bias is None)
    axis = sequence_axis() if route != "gather" else None
    if axis is None and form in (reference, xla):  # the compiler cuts these by itself
        out, lse = form(**arrays, **numbers)
    else:
        if axis is not None:
            form = tree(form, axis) if route == "tree" else ring(form, BACKWARD[form], axis)
            form = zigzag(form, axis) if route == "zigzag" else form
            arrays |= _filled_up(visible, bias, *ROUTES[route])
        axes = _axes(arrays, *ROUTES[route])
        out, lse = on_each_device(lambda own: form(**own, **numbers), arrays, axes, (axes["q"], axes["q"][:3]))
        out, lse = out[:, : q.shape[1]], lse[:, : q.shape[1]]
    return (out, lse) if return_lse else out


def _route(across: str | None, q: Array, k: Array, far: bool) -> str:
    """A key of ROUTES; far: a query may read keys as far away as there are, and no bias as large as the logits is laid out."""
    (_, length, heads, _), (_, num_keys, shared, _) = q.shape, k.shape
    able = ["gather"]
    if sequence_axis(num_keys):
        able = list(ROUTES) if sequence_axis(length) else ["tree", "gather"]
    if across is None:
        # What was read travels once as float32, keys and values travel once in theirs; the tree has queries to bring, too.
        if "tree" in able and 2 * length * heads <= num_keys * shared:
            return "tree"
        # Whether the mask is causal is known only when it runs. If so, a zigzag saves up to half of the time; if not, it costs
        # about one hop more.
        axis = sequence_axis(length, num_keys)
        long = axis and length >= LONG_PART * jax.sharding.get_abstract_mesh().shape[axis]
        return "zigzag" if long and far else able[0]
    if across not in ROUTES:
        raise ValueError(
            f"step_attention has no across={across!r}.{nearest(across, ROUTES)} Known: {', '.join(ROUTES)}."
        )
    if sequence_axis() and across not in able:
        raise ValueError(
            f"across={across!r} cuts {length} queries or {num_keys} keys over the mesh "
            f"{dict(jax.sharding.get_abstract_mesh().shape)}, which are fewer than the devices; use one of {', '.join(able)}."
        )
    return across


def _filled_up(visible: Visibility, bias: Array | None, *cut: str | None) -> dict[str, Any]:
    """With as many queries and keys on each device as on any other; those that are added see nothing and are not seen."""
    lengths = visible.upper.shape[2], visible.key.shape[2]
    full = visible.padded(*(filled_length(n) if axis else n for n, axis in zip(lengths, cut, strict=True)))
    more = full.key.shape[2] - lengths[1]
    return {"visible": full, "bias": bias if bias is None else jnp.pad(bias, [(0, 0)] * 3 + [(0, more)])}


def _axes(arrays: dict[str, Any], queries: str | None, keys: str | None) -> dict[str, Any]:
    """The kinds of each array's axes, for `on_each_device`."""
    axes: dict[str, Any] = {"q": ("batch", queries, "heads", None)}
    axes["k"] = axes["v"] = ("batch", keys, "heads", None)
    row = ("batch", None, queries)
    axes["visible"] = arrays["visible"].replace(lower=row, upper=row, key=("batch", None, keys))
    # The ring takes the columns of the keys that are there.
    columns = None if queries else keys
    axes["bias"] = None if arrays["bias"] is None else ("batch", "heads", queries, columns)
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
