"""A loss of a part's own: what it adds to the training's gradient, wherever in the network the part stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def with_side_loss(out: Array, loss: Array) -> Array:
    """`out` as it is; where the training's loss is differentiated, `loss` (a scalar) is added to it.

    The sum itself is not known to the training: what is to be seen of it goes another way.
    """
    return out


with_side_loss.defvjp(lambda out, loss: (out, loss), lambda loss, d_out: (d_out, jnp.ones_like(loss)))
