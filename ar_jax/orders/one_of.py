"""One of several orders, drawn for each example: a network for every direction (NUWA-Infinity's controller, S104)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.config import UsageError, build
from ar_jax.orders.protocol import Layout, Order, in_front

SCANS = ({"kind": "raster"}, {"kind": "column"})


def one_of(layout: Layout, orders: Sequence[Mapping[str, Any]] = SCANS) -> Order:
    """Each example is generated in one of these orders, all equally likely.

    It trains one network for all of them; `config.sampling.order` then names the one to sample in, or another.

    Args:
      layout: any that they take.
      orders: `kind` and options of each.

    Raises:
      UsageError: no orders, or orders whose steps are of different sizes.
    """
    from ar_jax.orders import ORDERS  # which has this order, too

    made: list[Order] = [build(ORDERS, order, "order.orders", layout=layout) for order in orders]
    if not made or any(order.sizes != made[0].sizes for order in made):
        raise UsageError(
            "config.order.orders must name orders whose steps are of the same sizes, such as one token each; "
            f"these take {', '.join(str(order.num_steps) for order in made) or 'no'} steps."
        )

    def deal(key: jax.Array, first: jax.Array) -> jax.Array:
        pick_key, key = jax.random.split(key)
        dealt = jnp.concatenate([order.slots(key, 1) for order in made])
        return in_front(dealt[jax.random.randint(pick_key, (), 0, len(made))], first)

    patch = made[0].patch if all(order.patch == made[0].patch for order in made) else ()
    return Order(made[0].step, made[0].position, shuffled=True, deal=deal, patch=patch)
