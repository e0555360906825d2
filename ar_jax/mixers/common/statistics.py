"""Numbers of a mixer that are no matter of gradients: they are measured, and stand in the parameters under `statistics`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

SCOPE = "statistics"  # the attribute by which a mixer has them, and so a part of their names


class Statistics(nn.Module):
    """One array that is not trained; see `is_statistic`.

    Attributes:
      shape: of the array.
      start: how it begins, as an initialiser.
      leaf: its name.
    """

    shape: tuple[int, ...]
    start: nn.initializers.Initializer
    leaf: str

    def setup(self) -> None:
        """The array, float32."""
        self.value = self.param(self.leaf, self.start, self.shape, jnp.float32)

    def __call__(self) -> Array:
        """The array, which no gradient reaches."""
        return jax.lax.stop_gradient(self.value)

    def moves(self, change: Array, out: Array) -> Array:
        """`out` as it is; its derivative by the array is not a gradient but `change`, which training adds to the array.

        So changes pass scans, rematerialisation and the cut over devices. They do not depend on what they are passed with.
        """
        return _noted(out, self.value, jax.lax.stop_gradient(change))


@jax.custom_vjp
def _noted(out: Array, value: Array, change: Array) -> Array:
    return out


_noted.defvjp(lambda out, value, change: (out, change), lambda change, d_out: (d_out, change, jnp.zeros_like(change)))


def is_statistic(name: str) -> bool:
    """Whether a leaf of this name is measured, not trained."""
    return SCOPE in name.split("/")[:-1]
