"""Which form of an operation runs, and how its arrays are cut over devices."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from ar_jax.kernels.dispatch import choose_form, interpreted, on_each_device, platform

FORMS = {"reference": 0, "xla": 1, "pallas_tpu": 2, "pallas_gpu": 3}


def mesh_of(platform: str) -> AbstractMesh:
    kind = {"tpu": "TPU v5 lite", "gpu": "NVIDIA H100 80GB HBM3", "cpu": "cpu"}[platform]
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize(("name", "default"), [("cpu", 1), ("tpu", 2), ("gpu", 3)])
def test_the_default_form_is_that_of_the_platform_of_the_mesh_in_use(name: str, default: int) -> None:
    with jax.sharding.use_abstract_mesh(mesh_of(name)):
        assert platform() == name
        assert interpreted() == (name == "cpu")
        assert choose_form("op", FORMS, None) == default
        assert choose_form("op", {"reference": 0, "xla": 1}, None) == 1


def test_a_form_that_is_unknown_or_not_for_the_platform_is_refused() -> None:
    with pytest.raises(ValueError, match="op has no implementation 'xlla'. Did you mean 'xla'"):
        choose_form("op", FORMS, "xlla")
    with (
        jax.sharding.use_abstract_mesh(mesh_of("gpu")),
        pytest.raises(ValueError, match="'pallas_tpu' does not run on 'gpu'; use one of reference, xla, pallas_gpu"),
    ):
        choose_form("op", FORMS, "pallas_tpu")


def test_without_a_mesh_of_several_devices_a_form_is_called_as_it_is() -> None:
    seen: list[Any] = []

    def form(arrays: Any) -> Any:
        seen.append(arrays["a"].shape)
        return arrays["a"]

    on_each_device(form, {"a": np.zeros((4, 3)), "b": None}, {"a": ("batch", None), "b": None}, ("batch", None))
    assert seen == [(4, 3)]


EIGHT_DEVICES = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType
from ar_jax.kernels.dispatch import on_each_device

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
shapes = []

def form(arrays):
    shapes.append({name: a.shape for name, a in arrays.items() if a is not None})
    return arrays["q"] * arrays["step"][..., None] + arrays["k"].sum(axis=1, keepdims=True)

def run(batch, heads, shared):
    q = jnp.arange(batch * heads * 3.0).reshape(batch, heads, 3)
    arrays = {"q": q, "k": jnp.ones((batch, shared, 3)), "step": jnp.ones((1, 1)), "bias": None}
    axes = {"q": ("batch", "heads", None), "k": ("batch", "heads", None), "step": ("batch", None), "bias": None}
    with jax.set_mesh(mesh):
        out = jax.jit(lambda a: on_each_device(form, a, axes, ("batch", "heads", None)))(arrays)
    parts = shapes.pop()
    # each device's part of the heads: with one shared head all see it whole
    return [parts[name][:2] for name in ("q", "k", "step")], out.shape

assert run(8, 4, 4) == ([(2, 2), (2, 2), (1, 1)], (8, 4, 3)), run(8, 4, 4)
assert run(6, 4, 1) == ([(3, 2), (3, 1), (1, 1)], (6, 4, 3)), run(6, 4, 1)  # 6 divides by data, not by data and fsdp
assert run(3, 3, 3) == ([(3, 3), (3, 3), (1, 1)], (3, 3, 3)), run(3, 3, 3)
assert run(1, 2, 2) == ([(1, 1), (1, 1), (1, 1)], (1, 2, 3)), run(1, 2, 2)
"""


def test_each_device_gets_its_part_of_batch_and_heads_where_they_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
def test_inside_no_axis_is_left_to_the_compiler_not_even_one_of_a_single_device() -> None:
    """It cannot cut a kernel of ours, and refuses one wherever it might have to."""
    seen: list[Any] = []

    def form(arrays: Any) -> Any:
        seen.append(jax.sharding.get_abstract_mesh().axis_types)
        return arrays["x"]

    mesh = jax.make_mesh((2, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        jax.jit(lambda x: on_each_device(form, {"x": x}, {"x": ("batch", None)}, ("batch", None)))(np.ones((4, 3)))
    assert seen and set(seen[0]) == {AxisType.Manual}
