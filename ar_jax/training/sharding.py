"""Where arrays live: two tables say which logical axes a parameter has and on which mesh axes those lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ar_jax.config import UsageError, nearest
from ar_jax.training.paths import map_with_name

Layout = Mapping[str, str]

# Path of a parameter -> logical names of its last axes; the first match wins. Axes before them (layers of a scan) and
# parameters without a match are replicated. The optimiser's moments have their parameter's path, and so its sharding.
PARAMETERS: list[tuple[str, tuple[str | None, ...]]] = [
    (r"(^|/)embedding$", ("vocab", "embed")),
    (r"(^|/)kernel$", ("embed", None)),
]

# Layout -> mesh axis of each logical axis.
LAYOUTS: dict[str, Layout] = {
    "replicated": {"batch": "data"},
    "fsdp": {"batch": "data", "embed": "data"},
}


def choose_layout(name: str, mesh: Mesh) -> Layout:
    """The layout of that name; UsageError if there is none, or if it needs an axis that the mesh has not."""
    if name not in LAYOUTS:
        raise UsageError(
            f"config.mesh.layout={name!r} is unknown.{nearest(name, LAYOUTS)} Known: {', '.join(LAYOUTS)}."
        )
    for axis in LAYOUTS[name].values():
        if axis not in mesh.shape:
            raise UsageError(
                f"config.mesh has no axis {axis!r}, which layout {name!r} needs; set config.mesh.{axis}=-1."
            )
    return LAYOUTS[name]


def batch_sharding(mesh: Mesh, layout: Layout) -> NamedSharding:
    """The sharding of a batch [B, ...]: its first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(layout["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(tree: Any, mesh: Mesh, layout: Layout) -> Any:
    """A sharding for every leaf of a state (arrays or their shapes), by its path."""
    return map_with_name(lambda name, leaf: NamedSharding(mesh, _partition(name, leaf.shape, mesh, layout)), tree)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Global arrays [B, ...] from the rows that this process has read."""
    return {key: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for key, rows in batch.items()}


def _partition(name: str, shape: tuple[int, ...], mesh: Mesh, layout: Layout) -> PartitionSpec:
    """The mesh axes of one leaf. An axis that does not divide evenly stays whole."""
    names = next((names for pattern, names in PARAMETERS if re.search(pattern, name)), ())
    if len(names) > len(shape):
        return PartitionSpec()
    axes = [layout.get(axis) if axis else None for axis in names]
    sizes = shape[len(shape) - len(names) :]
    spec = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, sizes, strict=True)]
    return PartitionSpec(*[None] * (len(shape) - len(names)), *spec) if any(spec) else PartitionSpec()
