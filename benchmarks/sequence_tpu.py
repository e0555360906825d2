"""Long sequences cut over TPUs that are not here: python benchmarks/sequence_tpu.py [LENGTH] [--chips 1 4 16].

The gradient of each operation, 8 heads of 128 channels in bfloat16, is compiled for chips of a v5e pod by the real TPU
compiler (libtpu: `make test` installs it into .cache; else name it by AR_JAX_LIBTPU=FILE); printed are the temporary memory
of a chip and what it sends.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from kernels_tpu import environment  # noqa: E402

HEADS, WIDTH = 8, 128


def operations() -> dict[str, Any]:
    """Functions of q, k, v [1, T, N, H] and steps [T]."""
    import functools

    import jax.numpy as jnp

    from ar_jax.kernels.delta_attention import delta_attention
    from ar_jax.kernels.linear_attention import linear_attention
    from ar_jax.kernels.step_attention import step_attention

    def attention(across: str, q: Any, k: Any, v: Any, step: Any) -> Any:
        return step_attention(q, k, v, step, step, across=across)

    def retention(q: Any, k: Any, v: Any, step: Any) -> Any:
        return linear_attention(q, k, v, log_decay=jnp.full(HEADS, -0.01))[0]

    def delta(q: Any, k: Any, v: Any, step: Any) -> Any:
        return delta_attention(q, k, v, jnp.full(q.shape[:3], 0.5))[0]

    ways = {f"step_attention, {across}": functools.partial(attention, across) for across in ("ring", "zigzag")}
    return ways | {"linear_attention": retention, "delta_attention": delta}


def compiled(operation: Any, length: int, devices: Any) -> Any:
    """Its gradient by q, k and v, each chip with its part of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("sequence",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    q = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16, sharding=over)
    step = jax.ShapeDtypeStruct((length,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("sequence")))

    def loss(*arrays: Any) -> Any:
        return (operation(*arrays).astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=over).lower(q, q, q, step).compile()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("length", type=int, nargs="?", default=65536)
    parser.add_argument("--chips", type=int, nargs="*", default=[1, 4, 16])
    values = parser.parse_args()
    os.environ.update(environment())
    from ar_jax.analysis.hlo import Program
    from ar_jax.training.topologies import topology_devices

    _, devices = topology_devices("v5e:4x4")
    print(f"| gradient of, {values.length} tokens | chips | temporary, MiB | sent, MiB |\n| --- | --- | --- | --- |")
    for name, operation in operations().items():
        for chips in values.chips:
            program = compiled(operation, values.length, devices[:chips])
            temporary = program.memory_analysis().temp_size_in_bytes / 2**20
            sent = sum(row.bytes for row in Program(program.as_text()).collectives({"sequence": chips})) / 2**20
            print(f"| `{name}` | {chips} | {temporary:,.0f} | {sent:,.2f} |", flush=True)


if __name__ == "__main__":
    main()
