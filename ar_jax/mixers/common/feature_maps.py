"""Feature maps of linear attention: phi, so that phi(q) . phi(k) weighs a pair of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

LARGEST_LOG = 30.0  # of an exponential feature: sums of products of two such stay inside float32


def square(x: Array) -> Array:
    """phi(x) . phi(y) = (x . y)^2 in H (H + 1) / 2 features: [..., H] to [..., H (H + 1) / 2] (arXiv:2402.10644)."""
    rows, columns = np.triu_indices(x.shape[-1], 1)
    return jnp.concatenate([jnp.square(x), math.sqrt(2) * x[..., rows] * x[..., columns]], axis=-1)


def line(x: Array) -> Array:
    """phi(x) . phi(y) = 1 + x . y: [..., H] to [..., 1 + H] (FAST, arXiv:2402.07901, p = 1)."""
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x], axis=-1)


def taylor(x: Array) -> Array:
    """phi(x) . phi(y) = 1 + x . y + (x . y)^2 / 2, exp to the second order (Based, arXiv:2402.18668; FAST, p = 2)."""
    return jnp.concatenate([line(x), square(x) * math.sqrt(0.5)], axis=-1)


def exponential(x: Array) -> Array:
    """exp of each channel (arXiv:2311.13541), of at most LARGEST_LOG nats either way."""
    return jnp.exp(jnp.clip(x, -LARGEST_LOG, LARGEST_LOG))


FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "elu": lambda x: nn.elu(x) + 1,  # arXiv:2006.16236
    "relu": nn.relu,
    "silu": nn.silu,
    "identity": lambda x: x,  # retention, arXiv:2307.08621
    "line": line,
    "taylor": taylor,
    "square": square,
    "exp": exponential,
}


def num_features(name: str, head_dim: int) -> int:
    """How many features a map makes of so many channels."""
    return jax.eval_shape(FEATURE_MAPS[name], jax.ShapeDtypeStruct((head_dim,), jnp.float32)).shape[0]


# The logarithms of linear attention's weights vary by a x + b where those of its queries and keys vary by x together, for
# x of some 4 to 10 (arXiv:2311.13541; the published fit, which is that of heads of some 64 channels).
LOG_NORMAL_FIT = (0.14855178144710912, -0.35487039130661086)


def matched_moments(query_std: Array, key_std: Array, fit: tuple[float, float] = LOG_NORMAL_FIT) -> tuple[Array, Array]:
    """alpha and beta with which exp(alpha q) . exp(beta k) is spread as exp(q . k / sqrt(H)) is (arXiv:2311.13541).

    The logarithms of softmax attention's weights have the variance query_std^2 key_std^2, those of linear attention's
    a (alpha^2 query_std^2 + beta^2 key_std^2) + b; both terms in brackets are made equal.

    Args:
      query_std: [], the standard deviation of the channels of queries.
      key_std: [], of keys.
      fit: a and b.
    """
    a, b = fit
    spread = jnp.sqrt(jnp.maximum(jnp.square(query_std * key_std) - b, 0) / (2 * a))
    return spread / query_std, spread / key_std
