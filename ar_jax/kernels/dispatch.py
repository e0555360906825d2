"""Which form of an operation runs, and on which part of its arrays each device works."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

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
    is a plain call. An axis is left whole where it does not divide every array's; sequences are filled up with zeros, and
    so are those that form returns.

    Args:
      form: a function of `arrays`, the same for any batch, number of heads and length of the axes called "sequence".
      arrays: a pytree of arrays; None is no leaf.
      axes: the same pytree with a tuple for each array: for each of its axes a key of MESH_AXES or None. Axes of size 1
        are shared by all, and stay whole.
      out_axes: such tuples for the pytree that form returns.

    Returns:
      What form returns.
    """
    mesh, free = _mesh_in_use()
    if all(mesh.shape[name] == 1 for name in free):
        return form(arrays)
    is_axes = lambda x: isinstance(x, tuple) and all(a is None or a in MESH_AXES for a in x)  # noqa: E731
    each = jax.tree.leaves(axes, is_leaf=is_axes)
    leaves = [_filled_up(*pair) for pair in zip(jax.tree.leaves(arrays), each, strict=True)]
    arrays = jax.tree.unflatten(jax.tree.structure(arrays), leaves)
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


def sequence_axis(*lengths: int) -> str | None:
    """The axis of the mesh in use over which sequences of these lengths are cut; None where one is too short, or there is none."""
    mesh, free = _mesh_in_use()
    (name,) = MESH_AXES["sequence"]
    if name not in free or mesh.shape[name] == 1:
        return None
    return name if all(length >= mesh.shape[name] for length in lengths) else None


def filled_length(length: int) -> int:
    """The length of a sequence of which each device has as much as any other; longer only where sequences are cut."""
    axis = sequence_axis(length)
    return length if axis is None else length + -length % jax.sharding.get_abstract_mesh().shape[axis]


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """x, cut over the mesh in use by the keys of MESH_AXES that its axes have; itself where there is no such mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    free = [name for name in free if mesh.shape[name] > 1]
    spec = [_cut(kind, mesh.shape, free, [x], [axes]) if kind else None for kind in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x


def _mesh_in_use() -> tuple[AbstractMesh, list[str]]:
    """The mesh, and those of its axes that are not each device's own affair already."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh, [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]


def _cut(
    kind: str, sizes: Mapping[str, int], free: Sequence[str], arrays: Sequence[Any], axes: Sequence[Any]
) -> tuple[str, ...] | None:
    """The mesh axes for a kind of axis, as many as divide every array's; sequences need but a token for each part."""
    lengths = {
        size
        for array, axis in zip(arrays, axes, strict=True)
        for size, name in zip(array.shape, axis, strict=True)
        if name == kind and size != 1
    }
    chosen: tuple[str, ...] = ()
    parts = 1
    for name in MESH_AXES[kind] if lengths else ():
        whole = parts * sizes.get(name, 1)
        fits = min(lengths) >= whole if kind == "sequence" else all(length % whole == 0 for length in lengths)
        if name in free and fits:
            chosen, parts = (*chosen, name), whole
    return chosen or None


def _filled_up(array: Any, axes: tuple[str | None, ...]) -> Any:
    """With zeros behind its sequence, up to `filled_length`."""
    more = [filled_length(n) - n if kind == "sequence" else 0 for n, kind in zip(array.shape, axes, strict=True)]
    return jnp.pad(array, [(0, count) for count in more]) if any(more) else array
