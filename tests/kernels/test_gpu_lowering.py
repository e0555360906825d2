"""Every GPU kernel, forward and backward, becomes Triton IR: what needs no compiler for GPUs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kernels_tpu import KERNELS, Case  # noqa: E402

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=1, platform="gpu")


def lowered(case: Case) -> str:
    """The program as it is given to a GPU's compiler; with such a mesh in use the kernels are not interpreted."""
    function, shapes = KERNELS[case.kernel](case)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(*arrays: Any) -> jax.Array:
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(function(*arrays)))

    floats = tuple(i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating))
    program = jax.grad(loss, argnums=floats) if case.direction == "backward" else function
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(program).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


_LINEAR = {f"linear_attention_{part}" for part in ("states", "outs", "states_gradient", "gradients")}
KERNELS_OF = {
    "step_attention": {"step_attention_forward", "step_attention_dq", "step_attention_dkdv"},
    "linear_attention, decay per step": _LINEAR,
    "linear_attention, decay per channel": _LINEAR | {"linear_attention_scores", "linear_attention_scores_gradient"},
    "delta_attention": {"delta_attention_states", "delta_attention_states_gradient"},
    "dplr_attention": {"delta_attention_states", "delta_attention_states_gradient"},
    "selective_scan": {f"selective_scan_{part}" for part in ("added", "join", "outs", "added_gradient", "gradients")},
}


@pytest.mark.parametrize("kernel", KERNELS_OF)
def test_it_becomes_triton_ir(kernel: str) -> None:
    text = lowered(Case(kernel, "backward", 1000, 80))
    assert set(re.findall(r'name = "(\w+)"', text)) == KERNELS_OF[kernel]


def test_the_decode_form_becomes_triton_ir() -> None:
    assert 'name = "step_attention_decode"' in lowered(Case("step_attention", "decode", 1000, 64))
