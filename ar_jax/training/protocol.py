"""What the trainer asks of whatever is trained: four functions, two of them traceable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax

Params = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = tuple[jax.Array, Mapping[str, jax.Array], Mapping[str, jax.Array]]


class Task(Protocol):
    """A model together with its objective. `init` and `loss` are pure and traceable: same arguments, same bits.

    Parameters are nested dicts of arrays. Leaves go by names such as "tokenizer/encoder/kernel": see `training.paths`.
    """

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; called under `jit`, so that each array is born with its sharding."""
        ...

    def frozen(self, name: str) -> bool:
        """Whether the optimiser leaves a leaf alone: no gradient, no decay, no moments, and no average of it is kept.

        So it must be for leaves that `loss` replaces, and may be for a part that was trained before.
        """
        ...

    def measured(self, name: str) -> bool:
        """Whether a frozen leaf is a statistic of the network.

        The loss's derivative by such a leaf is not a gradient, but a change, which training adds to it.
        """
        ...

    def loss(self, params: Params, batch: Batch, key: jax.Array, progress: jax.Array) -> Loss:
        """The mean loss of a batch.

        Args:
          params: what `init` returned, trained so far.
          batch: arrays [B, ...].
          key: a fresh key for this step (dropout, random orders, masks).
          progress: [] float32 in [0, 1), the part of the run that is done.

        Returns:
          The loss, [] float32; further scalars to log by name; and, by leaf name, the new values of frozen leaves that are
          state of another kind than weights (running means, codebooks that follow their codes, counters), often none.
          They hold from the next step on. Of a batch cut into micro-batches, each sees what the one before it left.
        """
        ...
