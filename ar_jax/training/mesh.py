"""The devices of a run as a named grid."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh

from ar_jax.config import UsageError


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh over the devices of all processes.

    Args:
      axes: size by axis name, outermost first, such as {"data": -1}; one may be -1: all devices that are left.

    Raises:
      UsageError: the sizes are not positive, or do not fit the number of devices.
    """
    num_devices = jax.device_count()
    sizes = {name: size for name, size in axes.items()}
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or (n < 1 and n != -1) for n in sizes.values()):
        raise UsageError(
            f"config.mesh={sizes} must give each axis a size of at least 1, or -1 for one of them; use data=-1."
        )
    open_axes = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1:
        raise UsageError(f"config.mesh={sizes} leaves {' and '.join(open_axes)} open; only one axis can be -1.")
    if open_axes:
        sizes[open_axes[0]] = num_devices // fixed
    if math.prod(sizes.values()) > num_devices or (open_axes and math.prod(sizes.values()) != num_devices):
        raise UsageError(
            f"config.mesh={dict(axes)} does not fit {num_devices} devices; use sizes whose product divides that."
        )
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
