"""Attention of each sequence's last tokens over a cache that lies in pages (arXiv:2309.06180)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.dispatch import choose_form, interpreted, on_each_device
from ar_jax.kernels.step_attention import FORMS as STEP_FORMS
from ar_jax.kernels.step_attention.pallas_tpu_blocks import LANES
from ar_jax.kernels.step_attention.pallas_tpu_decode import decode_pages, decodes
from ar_jax.kernels.step_attention.visibility import Visibility, visibility


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    lengths: Array,
    *,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """What the last T tokens of each sequence read of it, its keys and values lying in pages of a common pool.

    Token j of sequence b lies at k_pages[page_table[b, j // page], j % page]. Query t is token i = lengths_b - T + t:

    o_i = softmax_j(scale q_i . k_j) v_j over j <= i and, with a window, j > i - window

    On TPUs pages are read where they lie, and only those that the sequence has filled: with few queries, and H = 128 or a
    multiple of it with K a multiple of 8. Other forms gather them first.
    For sampling: the TPU form for few queries has no gradient.

    Args:
      q: [B, T, N, H], whose own keys are in the cache already.
      k_pages: [P, page, K, H], where N is a multiple of K.
      v_pages: [P, page, K, H].
      page_table: [B, max_pages] int32; entries beyond a sequence's length are not read.
      lengths: [B] int32, tokens of each sequence, the queries among them. A query before a sequence's beginning, as
        where lengths_b < T, gives zeros.
      scale: 1 / sqrt(H) if None.
      logit_soft_cap: keeps logits within +-cap (arXiv:2408.00118).
      window: only the last so many tokens are read, the query's own among them.
      return_lse: also return the log-sum-exp of the logits: what `merge` needs.
      implementation: a form of `step_attention`; None takes the platform's.

    Returns:
      [B, T, N, H] in the pages' dtype; with return_lse also [B, T, N] float32.

    Raises:
      ValueError: shapes that do not fit one another, or an implementation that is unknown or not for this platform.
    """
    _check(q, k_pages, v_pages, page_table, lengths)
    (batch, num_queries, _, head_dim), capacity = q.shape, page_table.shape[1] * k_pages.shape[1]
    query = lengths[:, None] - num_queries + jnp.arange(num_queries, dtype=jnp.int32)[None]
    query = jnp.where(query < 0, -1, query).astype(jnp.int32)
    visible = visibility(query, jnp.broadcast_to(jnp.arange(capacity)[None], (batch, capacity)), window=window)
    form = choose_form("paged_attention", FORMS, implementation)
    numbers = {"scale": head_dim**-0.5 if scale is None else float(scale), "soft_cap": logit_soft_cap}
    arrays = {"q": q, "k_pages": k_pages, "v_pages": v_pages, "page_table": page_table, "visible": visible}
    heads, pages, row = ("batch", None, "heads", None), (None, None, "heads", None), ("batch", None, None)
    axes: dict[str, Any] = {"q": heads, "k_pages": pages, "v_pages": pages, "page_table": row[:2]}
    axes["visible"] = jax.tree.map(lambda a: row, visible)
    if implementation in ("reference", "xla"):  # the compiler cuts these by itself
        out, lse = form(**arrays, **numbers)
    else:
        out, lse = on_each_device(lambda own: form(**own, **numbers), arrays, axes, (heads, heads[:3]))
    return (out, lse) if return_lse else out


def _gathered(
    name: str,
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    visible: Visibility,
    **options: Any,
) -> tuple[Array, Array]:
    """`step_attention` over the pages, brought together."""
    batch, capacity = len(q), visible.key.shape[2]
    k, v = (
        jnp.take(pages, page_table, axis=0, mode="clip").reshape(batch, capacity, *pages.shape[2:])
        for pages in (k_pages, v_pages)
    )
    return STEP_FORMS[name](q, k, v, visible, None, None, **options)


def _pallas_tpu(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, visible: Visibility, **options: Any
) -> tuple[Array, Array]:
    """Pages where they lie, or gathered: where there are many queries, or where the compiler would copy the whole pool.

    It lays out heads and widths other than these in a way that no page of whole rows is in one piece.
    """
    heads, head_dim = k_pages.shape[2:]
    in_pieces = head_dim != LANES and (head_dim % LANES or heads % 8)
    if decodes(q, None) and (interpreted() or not in_pieces):
        return decode_pages(q, k_pages, v_pages, page_table, visible, **options)
    return _gathered("pallas_tpu", q, k_pages, v_pages, page_table, visible, **options)


FORMS = {name: functools.partial(_gathered, name) for name in STEP_FORMS} | {"pallas_tpu": _pallas_tpu}


def _check(q: Array, k_pages: Array, v_pages: Array, page_table: Array, lengths: Array) -> None:
    if (
        q.ndim != 4
        or k_pages.ndim != 4
        or k_pages.shape != v_pages.shape
        or q.shape[3] != k_pages.shape[3]
        or q.shape[2] % k_pages.shape[2]
    ):
        raise ValueError(
            f"q {q.shape}, k_pages {k_pages.shape}, v_pages {v_pages.shape} should be [B, T, N, H], [P, page, K, H], "
            f"[P, page, K, H] with N a multiple of K"
        )
    if page_table.ndim != 2 or len(page_table) != len(q) or page_table.dtype.kind != "i":
        raise ValueError(f"page_table {page_table.shape} {page_table.dtype} should be int32 [{len(q)}, max_pages]")
    if lengths.shape != (len(q),) or lengths.dtype.kind != "i":
        raise ValueError(f"lengths {lengths.shape} {lengths.dtype} should be int32 [{len(q)}]")
