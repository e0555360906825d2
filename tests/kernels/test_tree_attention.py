"""Tree and ring attention over devices: the result of one device, and the bytes that travel."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ar_jax.analysis.hlo import Program
from ar_jax.kernels.step_attention import step_attention

HEADS, WIDTH, QUERIES = 2, 8, 8


def attend(q: jax.Array, k: jax.Array, v: jax.Array, across: str | None = None) -> Any:
    zeros = (jnp.zeros(n, jnp.int32) for n in (q.shape[1], k.shape[1]))
    return step_attention(q, k, v, *zeros, return_lse=True, across=across)


def mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def arrays(length: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (2, n, HEADS, WIDTH)) for key, n in zip(keys, (QUERIES, length, length), strict=True)
    ]


def compiled(across: str | None, length: int, devices: int) -> Any:
    """Where each device's part of the keys is there already, as in a cache."""
    over, given = mesh(devices), arrays(length)
    whole, cut = (NamedSharding(over, PartitionSpec(None, axis)) for axis in (None, "sequence"))
    shardings = (cut if across == "ring" else whole, cut, cut)
    with jax.set_mesh(over):
        return jax.jit(lambda *a: attend(*a, across=across), in_shardings=shardings).lower(*given).compile()


def travelling_bytes(across: str | None, length: int, devices: int) -> int:
    """Bytes that one device sends: of a reduction over P devices 2 (P - 1) / P of its array, of a permutation all."""
    found = Program(compiled(across, length, devices).as_text()).collectives({"sequence": devices})
    return sum(row.bytes for row in found)


def check(devices: int) -> None:
    """Both forms agree with one device, and the tree sends less by far; it is what few queries take."""
    q, k, v = arrays(64)
    expected, expected_lse = jax.jit(attend)(q, k, v)
    for across in ("tree", "ring"):
        program = compiled(across, 64, devices)
        shardings = program.input_shardings[0]
        out, lse = program(*(jax.device_put(a, s) for a, s in zip((q, k, v), shardings, strict=True)))
        np.testing.assert_allclose(out, expected, atol=2e-6)  # float32, sums of 64 terms
        np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
    tree, ring = (travelling_bytes(across, 64, devices) for across in ("tree", "ring"))
    per_query = 2 * HEADS * (WIDTH + 2) * 4  # batch, heads, what is read and two numbers, float32
    assert 0 < tree <= 2 * QUERIES * per_query
    each = 64 // devices * (2 * 2 * HEADS * WIDTH + 1) * 4  # keys and values of two examples, and the steps of all
    assert ring == (devices - 1) * each
    assert travelling_bytes("tree", 512, devices) == travelling_bytes(None, 512, devices) == tree
    assert travelling_bytes("ring", 512, devices) == 8 * ring


def test_tree_and_ring_agree_with_one_device_and_the_tree_sends_fewer_bytes() -> None:
    check(4)


@pytest.mark.parametrize("devices", [8])
def test_eight_devices_do_so_too(devices: int) -> None:
    """In a process of its own: the number of simulated devices is fixed before the first array."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    program = f"import test_tree_attention as t; t.check({devices})"
    here = os.path.dirname(__file__)
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{here}:{os.getcwd()}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
