"""The devices of a run as a named grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from ar_jax.config import UsageError, nearest

# What each axis of a mesh cuts: batches; batches and parameters; the tokens of a sequence; heads and hidden channels.
AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices of all processes.

    Args:
      axes: size by axis name, outermost first, such as {"data": -1}; one may be -1: all devices that are left.
      devices: to use instead of those that are here.

    Raises:
      UsageError: an unknown axis; the sizes are not positive, or do not fit the number of devices.
    """
    here = list(jax.devices() if devices is None else devices)
    num_devices = len(here)
    sizes = {name: size for name, size in axes.items()}
    for name in sizes:
        if name not in AXES:
            raise UsageError(f"config.mesh has axis {name!r}.{nearest(name, AXES)} Known: {', '.join(AXES)}.")
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
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=here[: math.prod(sizes.values())],
    )


def one_order(mesh: Mesh) -> dict[str, str]:
    """Compiler options by which all devices begin their collectives in one order.

    CPU devices are threads: of two collectives that are due, some may begin one and some the other, and wait for ever. XLA
    forgets the option in programs that it reads from a persistent cache; `XLA_FLAGS` hold for these, too.
    """
    several_cpus = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if several_cpus else {}
