"""Which form of an operation runs, and on which part of its arrays each device works."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from ar_jax.config import nearest

# Where each form is compiled. On CPUs the Pallas forms are interpreted: slow, but the same arithmetic.
PLATFORMS = {
    "reference": ("cpu", "tpu", "gpu"),
    "xla": ("cpu", "tpu", "gpu"),
    "pallas_tpu": ("tpu", "cpu"),
    "pallas_gpu": ("gpu", "cpu"),
}
DEFAULTS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}  # elsewhere: "xla"

# Axes of a mesh over which batches, heads and the tokens of a sequence are cut; other axes of the mesh hold copies.
MESH_AXES = {"batch": ("data", "fsdp"), "heads": ("tensor",), "sequence": ("sequence",)}


def platform() -> str:
    """What is compiled for: "cpu", "tpu" or "gpu"; that of the mesh in use (`jax.set_mesh`), or else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None or device.platform is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def interpreted() -> bool:
    """Whether Pallas kernels are interpreted: only accelerators compile them."""
    return platform() == "cpu"


def choose_form(op: str, forms: Mapping[str, Any], implementation: str | None, default: str | None = None) -> Any:
    """The form of that name; None takes `default`, or else the platform's own where the operation has it.

    Raises:
      ValueError: there is no such form, or the platform lacks it.
    """
    here = platform()
    name = implementation or default or DEFAULTS.get(here, "xla")
    if implementation is None and name not in forms:
        name = "xla"
    if name not in forms:
        raise ValueError(f"{op} has no implementation {name!r}.{nearest(name, forms)} Known: {', '.join(forms)}.")
    if here not in PLATFORMS[name]:
        able = [form for form in forms if here in PLATFORMS[form]]
        raise ValueError(f"{op}: implementation {name!r} does not run on {here!r}; use one of {', '.join(able)}.")
    return forms[name]


def on_each_device(form: Callable[..., Any], arrays: Any, axes: Any, out_axes: Any) -> Any:
    """form(arrays) where each device works on its own part of the batch, of the heads and of a sequence.

    The compiler cannot cut a Pallas kernel by itself. Without a mesh in use (`jax.set_mesh`) with axes of MESH_AXES this
    is a plain call. An axis is left whole where it does not divide every array's.

    Args:
      form: a function of `arrays`, the same for any batch, number of heads and length of the axes called "sequence".
      arrays: a pytree of arrays; None is no leaf.
      axes: the same pytree with a tuple for each array: for each of its axes a key of MESH_AXES or None. Axes of size 1
        are shared by all, and stay whole.
      out_axes: such tuples for the pytree that form returns.

    Returns:
      What form returns.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    if all(mesh.shape[name] == 1 for name in free):
        return form(arrays)
    is_axes = lambda x: isinstance(x, tuple) and all(a is None or a in MESH_AXES for a in x)  # noqa: E731
    leaves = jax.tree.leaves(arrays)
    each = jax.tree.leaves(axes, is_leaf=is_axes)
    cut = {kind: _cut(kind, mesh.shape, free, leaves, each) for kind in MESH_AXES}

    def spec(array: Any, axis: tuple[str | None, ...]) -> PartitionSpec:
        sizes = array.shape if array is not None else (0,) * len(axis)
        return PartitionSpec(
            *(cut[kind] if kind and size != 1 else None for kind, size in zip(axis, sizes, strict=True))
        )

    ins = jax.tree.unflatten(jax.tree.structure(arrays), [spec(*pair) for pair in zip(leaves, each, strict=True)])
    outs = jax.tree.map(lambda axis: spec(None, axis), out_axes, is_leaf=is_axes)
    mapped = jax.shard_map(form, mesh=mesh, in_specs=(ins,), out_specs=outs, axis_names=set(free), check_vma=False)
    return mapped(arrays)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """x, cut over the mesh in use by the keys of MESH_AXES that its axes have; itself where there is no such mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    free = [name for name in free if mesh.shape[name] > 1]
    spec = [_cut(kind, mesh.shape, free, [x], [axes]) if kind else None for kind in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x


def _cut(
    kind: str, sizes: Mapping[str, int], free: Sequence[str], arrays: Sequence[Any], axes: Sequence[Any]
) -> tuple[str, ...] | None:
    """The mesh axes for a kind of axis, as many as divide every array's."""
    lengths = {
        size
        for array, axis in zip(arrays, axes, strict=True)
        for size, name in zip(array.shape, axis, strict=True)
        if name == kind and size != 1
    }
    chosen: tuple[str, ...] = ()
    parts = 1
    for name in MESH_AXES[kind]:
        if lengths and name in free and all(length % (parts * sizes[name]) == 0 for length in lengths):
            chosen, parts = (*chosen, name), parts * sizes[name]
    return chosen or None
