"""Episodes of an environment as a data set: an example is a seed, and what happens follows from it and from the agent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.config import UsageError, build
from ar_jax.data.protocol import Dataset, Example
from ar_jax.environments import ENVIRONMENTS
from ar_jax.environments.protocol import Environment


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Whole numbers from `first` on as a `Source` of {"seed": int32 []}."""

    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return {"seed": np.asarray(self.first + index, np.int32)}

    def take(self, indices: np.ndarray) -> Example:
        """See Source."""
        return {"seed": (self.first + np.asarray(indices)).astype(np.int32)}


def load_episodes(environment: Mapping[str, Any], num_train: int = 100_000, num_test: int = 256) -> Dataset:
    """Seeds of an environment's chance.

    Args:
      environment: `kind`, a key of ENVIRONMENTS, and that one's options.
      num_train: seeds to learn from.
      num_test: other seeds, held out.

    Raises:
      UsageError: a number of seeds below 1, or what the environment does not take.
    """
    for name, value in (("num_train", num_train), ("num_test", num_test)):
        if value < 1:
            raise UsageError(f"config.data.{name}={value} must be at least 1.")
    made = build_environment(environment)
    train, test = Seeds(num_test, num_train), Seeds(0, num_test)
    return Dataset("episodes", (made.observation_dim,), train=train, test=test)


def build_environment(config: Mapping[str, Any]) -> Environment:
    """The environment that `config.data.environment` names."""
    environment: Environment = build(ENVIRONMENTS, config, "data.environment")
    return environment
