"""Next token, or next group of tokens: teacher forcing in the model's own order, or in random ones at first."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.config import UsageError
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context
from ar_jax.objectives.protocol import Loss, Params
from ar_jax.orders.protocol import shuffled_slots
from ar_jax.sampling.likelihood import teacher_forced


@dataclasses.dataclass(frozen=True)
class NextToken:
    """-mean_k log p(x[G_k] | x[G_<k]).

    Attributes:
      label_smoothing: see `Categorical.loss`.
      z_loss: see `Categorical.loss`.
      num_answers: only a random run of so many answers is trained; a backbone that can computes no others
        (Perceiver AR, arXiv:2202.07765). 0 trains all.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    num_answers: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for a run of fewer answers than none."""
        if self.num_answers < 0:
            raise UsageError(f"config.objective.num_answers={self.num_answers} must be at least 0, which trains all.")

    def check(self, model: Autoregressive) -> None:
        """Raises UsageError where a run of answers may begin in the middle of what one token answers."""
        if self.num_answers and model.feed.chunks[0].num_outputs > 1:
            raise UsageError(
                "config.objective.num_answers does not go with feed 'merge'; set it to 0, which trains all."
            )

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """See Objective."""
        context_key, key = jax.random.split(key)
        context = model.context(context_key, len(values), condition, model.generator.condition.guidance_dropout_rate)
        return self.in_order(model, params, values, context, key)

    def in_order(self, model: Autoregressive, params: Params, values: Array, context: Context, key: Array) -> Loss:
        """The loss in the order that the context names."""
        dropout_key, loss_key = jax.random.split(key)
        chunk = model.feed.parallel()
        if 0 < self.num_answers < len(chunk.answers):
            first = jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(chunk.answers) - self.num_answers + 1)
            run = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=self.num_answers)
            chunk = dataclasses.replace(
                chunk, asked=run(jnp.asarray(chunk.asked)), answers=run(jnp.asarray(chunk.answers))
            )
        hidden, target = teacher_forced(model, chunk, params, values, context, dropout_key)
        loss = model.ask(
            params, "loss", hidden, target, loss_key, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        return loss.mean(), {}


@dataclasses.dataclass(frozen=True)
class Permuted:
    """Next token in a random permutation with probability r, in the model's own order otherwise (RAR, arXiv:2411.00776).

    r is 1 until `anneal_start` (a fraction of the training), falls linearly to 0 at `anneal_end`, and stays there.

    Attributes:
      anneal_start: where r leaves 1.
      anneal_end: where r reaches 0.
      label_smoothing: see `Categorical.loss`.
      z_loss: see `Categorical.loss`.
    """

    anneal_start: float = 0.5
    anneal_end: float = 0.75
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def check(self, model: Autoregressive) -> None:
        """Raises UsageError where tokens are fed together that a permutation would tear apart."""
        if model.feed.chunks[0].num_outputs > 1:
            raise UsageError("config.objective.kind='permuted' does not go with feed 'merge'; use 'next_token'.")

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """See Objective."""
        context_key, shuffle_key, pick_key, key = jax.random.split(key, 4)
        context = model.context(context_key, len(values), condition, model.generator.condition.guidance_dropout_rate)
        rate = jnp.clip((self.anneal_end - progress) / max(self.anneal_end - self.anneal_start, 1e-6), 0.0, 1.0)
        shuffled = shuffled_slots(shuffle_key, len(values), model.order.length)
        pick = jax.random.bernoulli(pick_key, rate, (len(values), 1))
        context = dataclasses.replace(context, slots=jnp.where(pick, shuffled, context.slots))
        loss, metrics = NextToken(self.label_smoothing, self.z_loss).in_order(model, params, values, context, key)
        return loss, metrics | {"shuffled_fraction": rate}
