"""What an environment is: two pure functions and what an agent has to know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from ar_jax.config import UsageError

State = Any  # a pytree of arrays


class Transition(NamedTuple):
    """What an action leads to.

    Attributes:
      state: of the environment.
      observation: [observation_dim] float32.
      reward: [] float32.
      done: [] bool, the episode ends here; its last observation is not acted upon.
      success: [] bool, it ends as it should; False where it does not end.
    """

    state: State
    observation: Array
    reward: Array
    done: Array
    success: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """One environment. Its functions are traceable; many are run side by side by `jax.vmap`.

    Attributes:
      reset: key to the state and the observation that an episode begins with.
      step: state, action [] int32 and key to what follows.
      observation_dim: numbers in an observation.
      actions: their names.
      max_steps: an episode is done after so many at the latest.
    """

    reset: Callable[[Array], tuple[State, Array]]
    step: Callable[[State, Array, Array], Transition]
    observation_dim: int
    actions: tuple[str, ...]
    max_steps: int


def check_at_least(least: int, **options: int) -> None:
    """Raises UsageError for the first option of an environment that is below the least."""
    for name, value in options.items():
        if value < least:
            raise UsageError(f"config.data.environment.{name}={value} must be at least {least}.")
