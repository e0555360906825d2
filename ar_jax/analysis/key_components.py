"""The principal components of attention's keys, measured on data (Loki, arXiv:2406.02542)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.mixers.protocol import NEVER
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context
from ar_jax.training.paths import named_leaves, with_leaves

_LEAF = re.compile(r".*/layers/block_(\d+)/mixer/statistics/components")
Moments = dict[str, tuple[Array, Array, Array]]


def key_moments(model: Autoregressive, params: Any, values: Array, context: Context) -> Moments:
    """What the keys of each layer sum to, for each leaf of components, [R, K, H, H] in R repeats of the layers.

    Args:
      model: with mixers of kind "loki", whose state holds their turned keys.
      params: its parameters.
      values: [B, L] or [B, L, C] tokens.
      context: order and condition of each example.

    Returns:
      By leaf the number of keys [R], their sums [R, K, H], and the sums of their products [R, K, H, H].
    """
    start = model.generator.decoder.init_state(len(values), model.feed.max_len, model.feed.max_step_len)
    state: Any = model.read(params, values, context, model.feed.parallel(), start)[1]
    found: Moments = {}
    for name, components in named_leaves(params).items():
        if match := _LEAF.fullmatch(name):
            caches = [repeat[int(match[1])] for repeat in state]
            sums = [_sums(cache.k, cache.step < NEVER, turn) for cache, turn in zip(caches, components, strict=True)]
            count, first, second = (jnp.stack(part) for part in zip(*sums, strict=True))
            found[name] = (count, first, second)
    return found


def _sums(k: Array, there: Array, components: Array) -> tuple[Array, Array, Array]:
    """Of one layer's turned keys [B, K, S, H], turned back."""
    k = jnp.einsum("bksr,krh->bksh", k.astype(jnp.float32), components) * there[:, None, :, None]
    return there.sum().astype(jnp.float32), k.sum(axis=(0, 2)), jnp.einsum("bksh,bksi->khi", k, k, precision="highest")


def calibrated(
    model: Autoregressive, params: Any, batches: Iterable[tuple[Array, Context]]
) -> tuple[Any, dict[str, Any]]:
    """Parameters with the components of the keys of some batches of tokens.

    Returns:
      The parameters, and by leaf how much of the keys' variance each component has, [R, K, H].
    """
    measure = jax.jit(lambda values, context: key_moments(model, params, values, context))
    total: Moments | None = None
    for values, context in batches:
        own = measure(values, context)
        total = own if total is None else jax.tree.map(jnp.add, total, own)
    new, shares = {}, {}
    for name, (count, first, second) in (total or {}).items():
        mean = np.asarray(first, np.float64) / np.asarray(count, np.float64)[:, None, None]
        covariance = np.asarray(second, np.float64) / np.asarray(count, np.float64)[:, None, None, None]
        covariance -= mean[..., None] * mean[..., None, :]
        variance, vectors = np.linalg.eigh(covariance)
        new[name] = np.swapaxes(vectors[..., ::-1], -1, -2).astype(np.float32)
        variance = np.maximum(variance[..., ::-1], 0)
        shares[name] = variance / variance.sum(axis=-1, keepdims=True)
    return with_leaves(params, new), shares
