"""Masked tokens: a random part of the tokens is known, all others are asked for at once (MaskGIT, arXiv:2202.04200)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.feeds.mask import masked_chunk
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.objectives.protocol import Loss, Params
from ar_jax.sampling.likelihood import teacher_forced

SCHEDULES = {  # the unknown share as a function of a uniform draw, and of the least share
    "cosine": lambda u, least: least + (1 - least) * jnp.cos(np.pi / 2 * u),
    "linear": lambda u, least: least + (1 - least) * (1 - u),
    "arccos": lambda u, least: least + (1 - least) * jnp.arccos(u) * (2 / np.pi),
    "truncated_normal": lambda u, least: _truncated_normal(u, least),
}
DEVIATION = 0.25  # of MAR's normal distribution, whose mean is 1


def _truncated_normal(u: Array, least: float) -> Array:
    """Draws of N(1, DEVIATION^2) between `least` and 1 (MAR, arXiv:2406.11838, sec. 5)."""
    low = math.erfc((1 - least) / DEVIATION / math.sqrt(2)) / 2
    return 1 + DEVIATION * jax.scipy.special.ndtri(low + (0.5 - low) * u)


@dataclasses.dataclass(frozen=True)
class Masked:
    """Mean loss over the unknown tokens; their share is schedule(u) with u uniform on [0, 1), at least one token.

    Attributes:
      schedule: "cosine" (MaskGIT), "linear" (every share is equally likely), "arccos", or "truncated_normal" (MAR: half of
        a normal distribution with its mean at 1).
      least_masked: the smallest share; MAR's is 0.7, and a masked autoencoder then encodes at most 0.3 of the tokens.
      known_weight: weight of the known tokens' losses (TiTok's generator takes 0.1).
      label_smoothing: see `Categorical.loss`.
      z_loss: see `Categorical.loss`.
    """

    schedule: str = "cosine"
    least_masked: float = 0.0
    known_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses an unknown schedule or share."""
        choose(SCHEDULES, self.schedule, "objective.schedule")
        if not 0 <= self.least_masked < 1:
            raise UsageError(f"config.objective.least_masked={self.least_masked} must lie in [0, 1).")

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """See Objective."""
        context_key, mask_key, dropout_key, loss_key = jax.random.split(key, 4)
        batch, length = len(values), model.order.length
        context = model.context(context_key, batch, condition, model.generator.condition.guidance_dropout_rate)
        unknown = SCHEDULES[self.schedule](jax.random.uniform(mask_key, (batch,)), self.least_masked)
        most = length - max(math.ceil(length * self.least_masked), 1)
        known = jnp.clip(jnp.floor(length * (1 - unknown)), 0, most).astype(jnp.int32)
        chunk = masked_chunk(length, model.num_prefix, known, most)
        hidden, target = teacher_forced(model, chunk, params, values, context, dropout_key)
        loss = model.ask(
            params, "loss", hidden, target, loss_key, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        asked = (jnp.arange(length)[None] >= known[:, None]).astype(loss.dtype)
        weight = asked + self.known_weight * (1 - asked)
        return (loss * weight).sum() / weight.sum(), {"masked_fraction": asked.mean()}
