"""Where arrays live: an ordered list of rules cuts parameters over the axes of the mesh, batches go over two of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ar_jax.config import UsageError, nearest
from ar_jax.kernels.dispatch import MESH_AXES
from ar_jax.training.paths import map_with_name

# Logical axis of a parameter -> mesh axis that it is cut over. Batches, heads and sequences of activations: MESH_AXES.
LOGICAL_AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

# As a rule's axes: over fsdp along the longest axis that divides, where that is worth it.
LONGEST = "longest"
_WORTH_IT = 2**14  # numbers; gathering fewer takes longer than keeping them everywhere

Axes = tuple[str | None, ...] | str
Rule = tuple[str, Axes]

# Pattern of a parameter's name -> logical names of its last axes; the first match wins. Axes before them (the layers of a
# scan) stay whole. Moments and averages have their parameter's name, and so its sharding.
RULES: tuple[Rule, ...] = (
    # Attention: all that reads the residual stream is cut by heads, what writes to it is put together again.
    (r"(mixer|attention|softmax|lines_\d+|local)/(query|key|value)/kernel$", ("embed", "heads")),
    (r"(mixer|attention|softmax|lines_\d+|local)/out/kernel$", ("heads", "embed")),
    (r"mlp/(up|gate)/kernel$", ("embed", "mlp")),
    (r"mlp/down/kernel$", ("mlp", "embed")),
    (r"/logits/kernel$", ("embed", None)),
    (r"modulation/(project/)?kernel$", ("embed", None)),
    (r"/(kernel|embedding)$", LONGEST),
    # Norms, biases, and what a part keeps beside its products.
    (r"/(scale|bias|offset|modulation_bias)$", ()),
    (r"(mixer|mixer_gate|mlp_gate)/([^/]+/)*[^/]+$", LONGEST),
    # Tokens, positions and classes that are learned.
    (r"^params/(generator|posterior)/((first|second)/)?[^/]+(/[^/]+)?$", LONGEST),
    (r"^params/(tokenizer|discriminator|perceptual|gate|classifier|agent|batch_stats)/", LONGEST),
)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh that batches are spread over."""
    return tuple(axis for axis in MESH_AXES["batch"] if axis in mesh.shape)


def num_batch_shards(mesh: Mesh) -> int:
    """In how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch [B, ...]: its first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh) or None))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def checked_rules(rules: Sequence[Any]) -> tuple[Rule, ...]:
    """`config.mesh.rules` in front of RULES.

    Raises:
      UsageError: not pairs of a pattern and a tuple of logical axes, None where an axis stays whole, or "longest".
    """
    own = []
    for rule in rules:
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise UsageError(
                f"config.mesh.rules holds {rule!r}; write pairs such as ('mlp/up/kernel$', ('embed', 'mlp'))."
            )
        pattern, axes = rule[0], rule[1] if rule[1] == LONGEST else tuple(rule[1])
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"config.mesh.rules: {pattern!r} is no regular expression ({error}).") from error
        for axis in () if axes == LONGEST else axes:
            if axis is not None and axis not in LOGICAL_AXES:
                raise UsageError(
                    f"config.mesh.rules: {pattern!r} names axis {axis!r}.{nearest(str(axis), LOGICAL_AXES)} "
                    f"Known: {', '.join(LOGICAL_AXES)}, None, or {LONGEST!r} for all."
                )
        own.append((pattern, axes))
    return (*own, *RULES)


def tree_shardings(state: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """A sharding for every leaf of a state (arrays or their shapes), by its path.

    Raises:
      UsageError: a parameter that no rule matches, or an axis of one that a mesh axis does not divide; naming both.
    """

    def sharding(name: str, leaf: Any) -> NamedSharding:
        strict = name.startswith("params/")
        return NamedSharding(mesh, _partition(name, leaf.shape, mesh, rules, strict))

    return map_with_name(sharding, state)


def own_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a batch that the devices of this process hold, ascending; other processes may hold some of them, too."""
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held if index is not None]))


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays [B, ...] from the rows that this process has read: its own."""
    return {
        key: jax.make_array_from_process_local_data(sharding, np.asarray(rows), (batch_size, *np.shape(rows)[1:]))
        for key, rows in batch.items()
    }


def _partition(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule], strict: bool) -> PartitionSpec:
    """The mesh axes of one leaf; where that is not strict, what does not fit stays whole."""
    rule = next((rule for rule in rules if re.search(rule[0], name)), None)
    if rule is None:
        if strict:
            raise UsageError(
                f"No rule says how {name.removeprefix('params/')} of shape {list(shape)} is cut over the mesh "
                f"{dict(mesh.shape)}; add one to config.mesh.rules, such as (({name!r}, ('embed',)),)."
            )
        return PartitionSpec()
    pattern, axes = rule
    if axes == LONGEST:
        return _along_the_longest(shape, mesh)
    if len(axes) > len(shape):
        if strict:
            raise UsageError(
                f"config.mesh.rules: {pattern!r} names {len(axes)} axes, but {name.removeprefix('params/')} has shape "
                f"{list(shape)}."
            )
        return PartitionSpec()
    spec: list[str | None] = [None] * (len(shape) - len(axes))
    for logical, size in zip(axes, shape[len(spec) :], strict=True):
        axis = LOGICAL_AXES[logical] if logical else None
        parts = mesh.shape.get(axis, 1)
        if strict and size % parts:
            raise UsageError(
                f"config.mesh.{axis}={parts} does not divide axis {logical!r} of {name.removeprefix('params/')}, which "
                f"has shape {list(shape)}; use a divisor of {size}, or another rule for it in config.mesh.rules."
            )
        spec.append(axis if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*spec) if any(spec) else PartitionSpec()


def _along_the_longest(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Over fsdp along the longest axis that divides; whole where none does or there is little to cut."""
    parts = mesh.shape.get("fsdp", 1)
    able = [i for i, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not able or math.prod(shape) < _WORTH_IT:
        return PartitionSpec()
    longest = max(able, key=lambda i: shape[i])
    return PartitionSpec(*("fsdp" if i == longest else None for i in range(len(shape))))
