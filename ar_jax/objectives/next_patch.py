"""Next patch (NPP, S025, arXiv:2412.15321): tokens are grouped into patches, large ones at first, single tokens at last."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import NOWHERE, Chunk, chunk, prefix_source, prefix_steps
from ar_jax.mixers.protocol import take
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context
from ar_jax.objectives.protocol import Loss, Params
from ar_jax.orders.protocol import Order


@dataclasses.dataclass(frozen=True)
class NextPatch:
    """-mean over the tokens i of patch k of log p(x_i | patches < k): one distribution for all tokens of a patch.

    A patch is fed as the mean of its tokens' embeddings, at its place on a grid of patches. Nothing is added to the network,
    which after the last stage, of patches of one token, is one of next tokens.

    Attributes:
      sides: of the patches, in tokens, stage by stage; the last is 1.
      rate: each stage ends at this part of the end of the next one: 0.5 gives two stages one half of the training each.
      label_smoothing: see `Categorical.loss`.
      z_loss: see `Categorical.loss`.
    """

    sides: Sequence[int] = (2, 1)
    rate: float = 0.5
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        """Refuses stages that do not lead to single tokens."""
        if not self.sides or self.sides[-1] != 1 or min(self.sides) < 1 or not 0 < self.rate < 1:
            raise UsageError(
                f"config.objective.sides={tuple(self.sides)} must end with 1, and rate={self.rate} lie between 0 and 1."
            )

    def check(self, model: Autoregressive) -> None:
        """Raises UsageError for an order other than raster on one grid, or a grid that the patches do not divide."""
        for side in self.sides:
            patch_chunk(model.order, model.num_prefix, side)

    @property
    def stage_ends(self) -> tuple[float, ...]:
        """The part of the training at which each stage ends."""
        return tuple(self.rate ** (len(self.sides) - 1 - k) for k in range(len(self.sides)))

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """See Objective."""
        context_key, dropout_key, loss_key = jax.random.split(key, 3)
        context = model.context(context_key, len(values), condition, model.generator.condition.guidance_dropout_rate)
        stage = (progress >= jnp.asarray(self.stage_ends[:-1], jnp.float32)).sum()

        def nats_of(side: int) -> Array:
            hidden, target = patches(model, side, params, values, context, dropout_key)

            def loss(token: Array) -> Array:
                return model.ask(
                    params, "loss", hidden, token, loss_key, label_smoothing=self.label_smoothing, z_loss=self.z_loss
                )

            return jax.vmap(loss, in_axes=2)(target).mean()  # the logits of a patch are computed once

        nats = jax.lax.switch(stage, [lambda side=side: nats_of(side) for side in self.sides])
        return nats, {"patch_side": jnp.asarray(self.sides, jnp.float32)[stage]}


def patches(
    model: Autoregressive, side: int, params: Params, values: Array, context: Context, dropout_key: Array | None = None
) -> tuple[Array, Array]:
    """Hidden vectors [B, M, D] of all patches, and the tokens [B, M, K, ...] that each should predict.

    Args:
      model: network, and a raster order.
      side: of a patch, in tokens.
      params: the network's parameters.
      values: the data, on their slots.
      context: the condition of each example.
      dropout_key: trains with dropout; None does without.
    """
    fed, members = patch_chunk(model.order, model.num_prefix, side)
    hidden, _ = model.read(params, values, context, fed, dropout_key=dropout_key)
    target = take(values, context.slots[:, members.reshape(-1)])
    return fed.pick(hidden), target.reshape(len(values), *members.shape, *values.shape[2:])


def patch_chunk(order: Order, num_prefix: int, side: int) -> tuple[Chunk, np.ndarray]:
    """All patches but the last, behind the prefix, each asked for the next one; and the ranks of each patch.

    Args:
      order: raster, on one grid.
      num_prefix: prefix tokens, P.
      side: of a patch, in tokens, along each axis.

    Returns:
      A chunk of P + M - 1 tokens, and [M, K] int: the ranks of M patches of K tokens.

    Raises:
      UsageError: another order, or a side that does not divide the grid.
    """
    grid = np.asarray(order.position).max(axis=0) + 1
    if order.shuffled or (order.step != np.arange(order.length)).any() or np.prod(grid) != order.length:
        raise UsageError("config.objective.kind='next_patch' needs order 'raster' on one grid; set config.order.kind.")
    if (grid % side).any():
        raise UsageError(f"config.objective.sides has {side}, which must divide the grid {tuple(grid.tolist())}.")
    number = np.ravel_multi_index((order.position // side).T, grid // side)
    members = np.argsort(number, kind="stable").reshape(int(np.prod(grid // side)), -1)
    first, prefix = members[:, 0], np.full(num_prefix, NOWHERE)
    fed = chunk(
        source=np.concatenate([[prefix_source(p) for p in range(num_prefix)], first[:-1]]),
        place=np.concatenate([prefix, first[:-1]]),
        target=np.concatenate([prefix[1:], first]),
        step=np.concatenate([prefix_steps(num_prefix), np.arange(1, len(first))]),
    )
    lead = np.zeros((num_prefix, members.shape[1]), int)
    told = np.concatenate([lead, members[:-1]]).astype(np.int32)
    return dataclasses.replace(fed, members=told, cell_side=side), members
