"""Random groups: a random permutation, cut into groups that are drawn, too (LPD, arXiv:2507.01957)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import BLANK
from ar_jax.feeds.query import grouped_chunk
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.objectives.protocol import Loss, Params
from ar_jax.sampling.likelihood import teacher_forced


@dataclasses.dataclass(frozen=True)
class RandomGroups:
    """-mean_k log p(x[G_k] | x[G_<k]), where each example draws how large its groups are: a model for any number of steps.

    Attributes:
      sizes: lists of sizes, one of which is drawn for each example; each list adds up to the number of tokens.
      label_smoothing: see `Categorical.loss`.
      z_loss: see `Categorical.loss`.
    """

    sizes: Sequence[Sequence[int]]
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def check(self, model: Autoregressive) -> None:
        """Raises UsageError where the sizes are not the model's, or its feed does not ask by queries."""
        length = model.order.length
        for row in self.sizes:
            if sum(row) != length or min(row) < 1:
                raise UsageError(
                    f"config.objective.sizes has a row {tuple(row)[:8]}… whose sum is {sum(row)}; each must hold whole numbers "
                    f"of at least 1 whose sum is the number of tokens, {length}."
                )
        first = model.feed.chunks[0]
        if not self.sizes or not model.feed.remembers or not (np.asarray(first.source) == BLANK).any():
            raise UsageError(
                "config.objective.kind='random_groups' needs rows of sizes, and config.feed.kind='query'; set both."
            )

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """See Objective."""
        context_key, pick_key, dropout_key, loss_key = jax.random.split(key, 4)
        batch = len(values)
        context = model.context(context_key, batch, condition, model.generator.condition.guidance_dropout_rate)
        steps = np.stack([np.repeat(np.arange(len(row)), row) for row in self.sizes]).astype(np.int32)
        drawn = jax.random.randint(pick_key, (batch,), 0, len(steps))
        chunk = grouped_chunk(model.num_prefix, jnp.asarray(steps)[drawn])
        hidden, target = teacher_forced(model, chunk, params, values, context, dropout_key)
        loss = model.ask(
            params, "loss", hidden, target, loss_key, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        return loss.mean(), {}
