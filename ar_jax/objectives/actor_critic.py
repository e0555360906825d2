"""Advantage actor-critic (A2C, arXiv:1602.01783), as AGaLiTe's T-Maze has it (arXiv:2310.15719)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.config import UsageError
from ar_jax.sampling.rollouts import Rollout


@dataclasses.dataclass(frozen=True)
class ActorCritic:
    """Mean of -log p(a_t) (G_t - V_t) + value_weight (G_t - V_t)^2 - entropy_weight H_t, where G_t and the first V_t are given.

    G_t = r_t + discount ((1 - trace_decay) V_{t+1} + trace_decay G_{t+1}), and r_t where the episode ends; behind the last
    step G is V. One step of the optimiser is made of each rollout.

    Attributes:
      rollout_length: steps that each agent takes, from an episode's start on.
      discount: of the value a step later (gamma).
      trace_decay: how far returns reach before values stand for them (lambda): at 0 a step, at 1 to the end.
      value_weight: of the values' squared errors.
      entropy_weight: of the policy's entropy, in nats.

    Raises:
      UsageError: a value out of its range.
    """

    rollout_length: int = 128
    discount: float = 0.99
    trace_decay: float = 0.95
    value_weight: float = 0.5
    entropy_weight: float = 0.01

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.rollout_length < 1:
            raise UsageError(f"config.objective.rollout_length={self.rollout_length} must be at least 1.")
        for name in ("discount", "trace_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"config.objective.{name}={getattr(self, name)} must lie in [0, 1].")
        for name in ("value_weight", "entropy_weight"):
            if getattr(self, name) < 0:
                raise UsageError(f"config.objective.{name}={getattr(self, name)} must be at least 0.")

    def __call__(self, logits: Array, values: Array, rollouts: Rollout) -> tuple[Array, dict[str, Array]]:
        """The loss and its parts.

        Args:
          logits: [B, T + 1, A] float32 of the rollouts' observations.
          values: [B, T + 1] float32.
          rollouts: what was done, of arrays [B, ...].

        Returns:
          The loss, and by name: its parts; `reward_per_step`; and of all episodes that ended `mean_return` and `success_rate`
          (0 where none did), and how many there are in a rollout, `episodes`.
        """
        given = jax.lax.stop_gradient(values)
        discounts = self.discount * (1 - rollouts.done.astype(jnp.float32))
        returns = lambda_returns(rollouts.rewards, discounts, given[:, 1:], self.trace_decay)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        taken = jnp.take_along_axis(log_probs, rollouts.actions[..., None], axis=-1)[..., 0]
        parts = {
            "policy_loss": -(taken * (returns - given[:, :-1])).mean(),
            "value_loss": jnp.square(returns - values[:, :-1]).mean(),
            "entropy_nats": -(jnp.exp(log_probs) * log_probs).sum(axis=-1).mean(),
        }
        loss = parts["policy_loss"] + self.value_weight * parts["value_loss"]
        loss -= self.entropy_weight * parts["entropy_nats"]
        ends = rollouts.done.sum()
        told = {"mean_return": (rollouts.returns * rollouts.done).sum(), "success_rate": rollouts.success.sum()}
        parts |= {name: total / jnp.maximum(ends, 1) for name, total in told.items()}
        return loss, parts | {"reward_per_step": rollouts.rewards.mean(), "episodes": ends / len(rollouts.done)}


def lambda_returns(rewards: Array, discounts: Array, next_values: Array, trace_decay: float) -> Array:
    """G_t = r_t + discount_t ((1 - lambda) V_{t+1} + lambda G_{t+1}), with V behind the last step for G, [B, T].

    Args:
      rewards: [B, T].
      discounts: [B, T], 0 where the episode ends.
      next_values: [B, T], V_{t+1}.
      trace_decay: lambda.
    """

    def back(later: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, discount, value = inputs
        here = reward + discount * ((1 - trace_decay) * value + trace_decay * later)
        return here, here

    by_time = rewards.T, discounts.T, next_values.T
    return jax.lax.scan(back, next_values[:, -1], by_time, reverse=True)[1].T
