"""Masked tokens: a random part of the tokens is known, all others are asked for at once (MaskGIT, arXiv:2202.04200)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import choose
from ar_jax.feeds.mask import masked_chunk
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.objectives.protocol import Loss, Params
from ar_jax.sampling.likelihood import teacher_forced

SCHEDULES = {
    "cosine": lambda u: jnp.cos(np.pi / 2 * u),
    "linear": lambda u: 1 - u,
    "arccos": lambda u: jnp.arccos(u) * (2 / np.pi),
}


@dataclasses.dataclass(frozen=True)
class Masked:
    """Mean loss over the unknown tokens; their share is schedule(u) with u uniform on [0, 1), at least one token.

    Attributes:
      schedule: "cosine" (MaskGIT), "linear" (every share is equally likely) or "arccos".
      label_smoothing: see `Categorical.loss`.
      z_loss: see `Categorical.loss`.
    """

    schedule: str = "cosine"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        """Refuses an unknown schedule."""
        choose(SCHEDULES, self.schedule, "objective.schedule")

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """See Objective."""
        context_key, mask_key, dropout_key, loss_key = jax.random.split(key, 4)
        batch, length = len(values), model.order.length
        context = model.context(context_key, batch, condition, model.generator.condition.guidance_dropout_rate)
        unknown = SCHEDULES[self.schedule](jax.random.uniform(mask_key, (batch,)))
        known = jnp.clip(jnp.floor(length * (1 - unknown)), 0, length - 1).astype(jnp.int32)
        chunk = masked_chunk(length, model.num_prefix, known)
        hidden, target = teacher_forced(model, chunk, params, values, context, dropout_key)
        loss = model.ask(params, "loss", hidden, target, loss_key, self.label_smoothing, self.z_loss)
        asked = (jnp.arange(length)[None] >= known[:, None]).astype(loss.dtype)
        return (loss * asked).sum() / asked.sum(), {"masked_fraction": asked.mean()}
