"""What an objective promises: a loss of a batch of tokens."""

from __future__ import annotations

from typing import Any, Protocol

from jax import Array

from ar_jax.models.autoregressive import Autoregressive

Params = Any
Loss = tuple[Array, dict[str, Array]]


class Objective(Protocol):
    """What is trained. Pure and traceable.

    One that trains networks that are fed all that is known in every step has an attribute `masked`, which is True. One that knows
    no likelihood but a lower bound of it has a method `bound(model, params, values, condition, key)`, [B] nats.
    """

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """The mean loss per token, a float32 scalar, and further scalars by name.

        Args:
          model: network, order and feed.
          params: the network's parameters.
          values: [B, L] int32 or [B, L, C] float32 tokens on their slots.
          condition: see `Context`.
          key: seeds dropout, orders and masks of this batch.
          progress: [] float32 in [0, 1), the part of the training that is done.
        """
