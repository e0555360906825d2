"""What the trainer asks of whatever is trained: two traceable functions."""

from __future__ import annotations

from typing import Any, Protocol

import jax

Params = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task(Protocol):
    """A model together with its objective. Both methods are pure and traceable: same arguments, same bits."""

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; called under `jit`, so that each array is born with its sharding."""
        ...

    def loss(self, params: Params, batch: Batch, key: jax.Array, progress: jax.Array) -> tuple[jax.Array, Metrics]:
        """The mean loss of a batch.

        Args:
          params: what `init` returned, trained so far.
          batch: arrays [B, ...].
          key: a fresh key for this step (dropout, random orders, masks).
          progress: [] float32 in [0, 1), the part of the run that is done.

        Returns: the loss, [] float32, and further scalars to log by name.
        """
        ...
