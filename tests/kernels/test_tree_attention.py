"""Tree and ring attention over devices: the result of one device, and the bytes that travel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels.step_attention import step_attention
from ar_jax.kernels.step_attention.tree import ring_attention, tree_attention

HEADS, WIDTH = 2, 8


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    zeros = (jnp.zeros(n, jnp.int32) for n in (q.shape[1], k.shape[1]))
    return step_attention(q, k, v, *zeros, return_lse=True)


def mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (devices,), ("keys",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )


def arrays(length: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, n, HEADS, WIDTH)) for key, n in zip(keys, (1, length, length), strict=True)]


def travelling_bytes(form: Any, length: int, devices: int) -> int:
    """Bytes that one device sends: of a reduction over P devices 2 (P - 1) / P of its array, of a permutation all."""
    text = jax.jit(lambda *a: form(attend, *a, mesh(devices), "keys")).lower(*arrays(length)).as_text()
    total = 0
    for op, dims in re.findall(
        r'"stablehlo\.(all_reduce|collective_permute)".*?-> tensor<([0-9x]+)xf32>', text, re.DOTALL
    ):
        size = 4 * int(np.prod([int(n) for n in dims.split("x")]))
        total += 2 * size * (devices - 1) // devices if op == "all_reduce" else size
    return total


def check(devices: int) -> None:
    """Both forms agree with one device, and the tree sends less by far."""
    q, k, v = arrays(64)
    expected, expected_lse = attend(q, k, v)
    for form in (tree_attention, ring_attention):
        out, lse = jax.jit(lambda q, k, v, form=form: form(attend, q, k, v, mesh(devices), "keys"))(q, k, v)
        np.testing.assert_allclose(out, expected, atol=2e-6)  # float32, sums of 64 terms
        np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
    tree, ring = (travelling_bytes(form, 64, devices) for form in (tree_attention, ring_attention))
    per_query = 2 * HEADS * (WIDTH + 2) * 4  # batch, heads, what is read and two numbers, float32
    assert 0 < tree <= 2 * per_query
    assert ring == (devices - 1) * 2 * (2 * 64 // devices * HEADS * WIDTH * 4)
    assert travelling_bytes(tree_attention, 512, devices) == tree
    assert travelling_bytes(ring_attention, 512, devices) == 8 * ring


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
