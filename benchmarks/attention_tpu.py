"""Step attention on TPUs beside JAX's splash attention, in cycles of a block: python benchmarks/attention_tpu.py [--markdown FILE].

The grid of step attention is as long as the list of visited blocks, which only the running program knows; so its kernel
is compiled with one kind of block at a time, and the cycles of one step of the grid are read. Splash attention is compiled
with the same blocks. Also told: how many blocks each kind of mask visits, and the least that blocks of this size allow.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from kernels_tpu import CHIPS, HEADS, Case, compile_case, environment, libtpu  # noqa: E402

LENGTH, HEAD_DIM, BLOCK = 4096, 128, 1024
KINDS = {"MIXED": 1, "FULL": 2}
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}  # of a chip; each runs its part of the heads, and cycles are those of one core


def compile_blocks(chip: str, what: str) -> None:
    """Compiles step attention with blocks of one kind, forward and backward, or splash attention."""
    if what == "splash":
        return _compile_splash(chip)
    from ar_jax.kernels.step_attention import pallas_tpu_blocks

    pallas_tpu_blocks.COMPUTED = (KINDS[what],)
    compile_case(Case("step_attention", "backward", LENGTH, HEAD_DIM), chip)


def _compile_splash(chip: str) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0])
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS)
    sizes = splash.BlockSizes(block_q=BLOCK, block_kv=BLOCK, block_kv_compute=BLOCK)
    attend = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    q = jax.ShapeDtypeStruct((HEADS, LENGTH, HEAD_DIM), jnp.bfloat16, sharding=place)
    jax.jit(attend).lower(q, q, q).compile()


def cycles(chip: str, what: str) -> dict[str, int]:
    """Cycles by kernel, compiled in a process of its own."""
    from tpu_cycles import schedules

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--compile", chip, what]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return {name: schedule.cycles for name, schedule in schedules(Path(folder)).items()}


def one(found: dict[str, int], name: str) -> int:
    """The kernel whose name begins so."""
    return next(n for kernel, n in found.items() if name in kernel)


def block_rows(chip: str) -> list[list[str]]:
    """Cycles of a visited block of 1024 x 1024 and a head."""
    kinds = {kind: cycles(chip, kind) for kind in KINDS}
    splash = one(cycles(chip, "splash"), "splash") * CORES[chip] / (HEADS * (LENGTH // BLOCK) ** 2)
    rows = []
    for direction in ("forward", "backward"):
        full, mixed = (one(kinds[kind], f"step_attention_{direction}") for kind in ("FULL", "MIXED"))
        causal = HEADS * (6 * full + 4 * mixed)  # of 4 x 4 blocks 6 lie below the diagonal, 4 on it
        beside = [f"{splash:,.0f}", f"{causal / (HEADS * 10 * splash):.2f}"] if direction == "forward" else ["", ""]
        rows.append([chip, direction, f"{full:,}", f"{mixed:,}", f"{causal:,}", *beside])
    return rows


def masks() -> dict[str, Any]:
    """Steps of queries and keys by kind of mask."""
    r = np.random.default_rng(0)
    sides = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    scales = np.repeat(np.arange(len(sides)), [side * side for side in sides])
    return {
        "causal, 4096": np.arange(LENGTH),
        "next scale, 680": scales,
        "random order, fed in its order, 4096": np.arange(LENGTH),
        "random order, fed in raster order, 4096": r.permutation(LENGTH),
        "blocks of 64 tokens, 4096": np.arange(LENGTH) // 64,
    }


def mask_rows() -> list[list[str]]:
    """Visited blocks, and the least there can be: those in which the dense mask has anything."""
    import jax.numpy as jnp

    from ar_jax.kernels.step_attention import pallas_tpu_blocks
    from ar_jax.kernels.step_attention.visibility import visibility

    rows = []
    for name, step in masks().items():
        for size in (128, pallas_tpu_blocks.block_size(len(step))):
            row = jnp.asarray(step, jnp.int32)[None]
            length = -(-len(step) // size) * size
            kinds = visibility(row, row).padded(length, length).blocks(size, size)
            visited = int(pallas_tpu_blocks.visits(kinds)[1][0])
            dense = np.zeros((length, length), bool)
            dense[: len(step), : len(step)] = step[None, :] <= step[:, None]
            count = length // size
            least = int(dense.reshape(count, size, count, size).any(axis=(1, 3)).sum())
            rows.append([name, str(size), str(count * count), str(visited), str(least)])
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--markdown", type=Path, help="FILE.md to write the tables to")
    parser.add_argument("--compile", nargs=2, metavar=("CHIP", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        return compile_blocks(*options.compile)
    if libtpu() is None:
        sys.exit("The TPU's compiler is not here; `make test` installs it, or set AR_JAX_LIBTPU to a libtpu.so.")
    os.environ["JAX_PLATFORMS"] = "cpu"
    head = ["chip", "direction", "FULL", "MIXED", "causal, 8 x 4096", "splash, a block", "causal / splash"]
    text = table(head, [row for chip in options.chip for row in block_rows(chip)])
    text += "\n\n" + table(["mask", "block", "blocks", "visited", "least"], mask_rows())
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
