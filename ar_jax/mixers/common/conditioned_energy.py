"""How much attention a token gets, by what an encoder made of it and by external features of it (arXiv:1906.03674)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose

CONDITIONINGS = ("none", "concat", "gate", "affine", "tanh_affine")


class ConditionedEnergy(nn.Module):
    """e_t = w f(h_t, c_t): f is [h, c] ("concat"), sigmoid(W c) * h ("gate"), (W c) * h + V c ("affine"), its tanh, or h ("none").

    Attributes:
      conditioning: one of CONDITIONINGS; "tanh_affine" is in the official code.
      num_layers: of w: one is linear; each further one is as wide as what it reads, with a tanh. The official baseline has 2.
      dropout_rate: behind each tanh.

    Raises:
      UsageError: an unknown conditioning, or no features where they are read.
    """

    conditioning: str = "gate"
    num_layers: int = 1
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array, features: Array | None = None, train: bool = False) -> Array:
        """[B, T] float32 of h [B, T, D] and features c [B, T, F]; with dropout where it trains."""
        choose(dict.fromkeys(CONDITIONINGS), self.conditioning, "model.mixer.conditioning")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if features is None and self.conditioning != "none":
            raise UsageError(
                f"conditioning={self.conditioning!r} reads features, but there are none; set config.model.lexicon, or pass "
                "them, or take conditioning='none'."
            )
        judged, width = h, h.shape[-1]
        if features is not None and self.conditioning == "concat":
            judged = jnp.concatenate([h, features.astype(h.dtype)], axis=-1)
        elif features is not None and self.conditioning == "gate":
            judged = nn.sigmoid(nn.Dense(width, name="gate", **types)(features)) * h
        elif features is not None and self.conditioning != "none":
            scale, shift = (nn.Dense(width, name=name, **types)(features) for name in ("scale", "shift"))
            judged = scale * h + shift
            judged = nn.tanh(judged) if self.conditioning == "tanh_affine" else judged
        for i in range(self.num_layers - 1):
            judged = nn.tanh(nn.Dense(judged.shape[-1], name=f"layer_{i}", **types)(judged))
            judged = nn.Dropout(self.dropout_rate)(judged, deterministic=not train)
        return nn.Dense(1, name="score", **types)(judged)[..., 0].astype(jnp.float32)
