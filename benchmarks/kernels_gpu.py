"""Kernels compiled for a GPU that is not here: python benchmarks/kernels_gpu.py --target FILE [--kernel NAME] [--markdown FILE].

Each case goes through Triton and ptxas to machine code on any machine; the table tells what a thread and a program of
each kernel need: registers (255 at most), bytes that did not fit into them and are spilled, bytes of shared memory.

The compiler is the CUDA plugin of the installed jax, in a folder of its own (1.2 GB), so that nothing else finds it:

    pip install --no-deps --target .cache/cuda jax-cuda12-plugin==$VERSION jax-cuda12-pjrt==$VERSION nvidia-cuda-nvcc-cu12

`--plugin DIR` names another one. FILE describes the GPU, an H100 say: XLA's text form of a target configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from kernels_tpu import KERNELS, Case  # noqa: E402

ARCHITECTURE = "sm_90a"
_ENTRY = re.compile(r"\.entry (\w+)\(")
_SHARED = re.compile(r"ttg\.shared = (\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kernel needs.

    Attributes:
      name: of its function.
      registers: of a thread.
      spill_bytes: of a thread, stored and loaded.
      shared_bytes: of a program.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def environment(plugin: Path, dump: str) -> dict[str, str]:
    """What the environment of a process that compiles for GPUs must hold; it writes what it makes into `dump`."""
    flags = [
        f"--xla_gpu_cuda_data_dir={plugin / 'nvidia' / 'cuda_nvcc'}",
        "--xla_gpu_autotune_level=0",  # there is nothing to try things on
        "--xla_gpu_enable_triton_gemm=false",  # products around the kernels: not asked about, and slow to compile
        f"--xla_dump_to={dump}",
        "--xla_dump_emitter_re=triton-to-llvm",
    ]
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "JAX_ENABLE_COMPILATION_CACHE": "false"}


def compile_case(case: Case, dtype: str, target: str) -> None:
    """Compiles one program; what the compiler makes is in the folder that `environment` names."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=Path(target).read_text(), topology="1x1x1"
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    function, shapes = KERNELS[case.kernel](case)
    arguments = [
        jax.ShapeDtypeStruct(
            shape, dtype if kind == jnp.bfloat16 else kind, sharding=NamedSharding(mesh, PartitionSpec())
        )
        for shape, kind in shapes
    ]

    def loss(*arrays: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(function(*arrays))
        return sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in leaves)

    floats = tuple(i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating))
    program = jax.grad(loss, argnums=floats) if case.direction == "backward" else function
    with jax.set_mesh(mesh):
        jax.jit(program).lower(*arguments).compile()


def kernels_of(case: Case, dtype: str, target: Path, plugin: Path) -> list[Kernel]:
    """The Pallas kernels of a program, compiled in a process of its own.

    Raises:
      RuntimeError: the compiler refused it; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = json.dumps([dataclasses.astuple(case), dtype, str(target)])
        command = [sys.executable, __file__, "--target", str(target), "--plugin", str(plugin), "--compile", told]
        done = subprocess.run(command, env=environment(plugin, folder), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{case}, {dtype}: {done.stderr[-3000:]}")
        found = read(Path(folder), plugin / "nvidia" / "cuda_nvcc" / "bin" / "ptxas")
        return [kernel for kernel in found if "fusion" not in kernel.name]


def read(folder: Path, ptxas: Path) -> Iterator[Kernel]:
    """The kernels whose programs lie in a folder, XLA's own Triton kernels among them."""
    shared = {}
    for path in folder.glob("*.triton-to-llvm.txt"):
        found = _SHARED.findall(path.read_text(errors="replace"))
        shared[path.name.split(".")[-3]] = int(found[-1]) if found else 0
    for path in sorted(folder.glob("*.ptx")):
        entry = _ENTRY.search(path.read_text())
        if entry and entry[1] in shared:
            command = [str(ptxas), "-v", f"-arch={ARCHITECTURE}", str(path), "-o", os.devnull]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            yield Kernel(entry[1], *_needs(told), shared[entry[1]])


def _needs(told: str) -> tuple[int, int]:
    """Registers, and spilled bytes, in what ptxas says of one kernel."""
    registers, spills = _REGISTERS.search(told), _SPILLS.search(told)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas says no number of registers: {told}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """The cases that the arguments choose."""
    for kernel in KERNELS:
        if options.kernel in kernel:
            for head_dim in options.head_dim:
                for direction in options.direction:
                    if direction != "decode" or kernel.startswith("step"):
                        yield Case(kernel, direction, options.length, head_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="FILE that describes the GPU")
    parser.add_argument("--plugin", type=Path, default=ROOT / ".cache" / "cuda", help="DIR of the CUDA plugin")
    parser.add_argument("--kernel", default="", help="only kernels whose names contain this")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--direction", nargs="+", default=["backward", "decode"], help="backward runs forward first")
    parser.add_argument("--markdown", type=Path, help="FILE.md to write the table to")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.plugin / "nvidia" / "cuda_nvcc").is_dir():
        sys.exit(f"There is no CUDA plugin in {options.plugin}; {parser.prog} --help tells how to install one.")
    if options.compile:
        sys.path.append(str(options.plugin))
        case, dtype, target = json.loads(options.compile)
        compile_case(Case(*case), dtype, target)
        return
    lines = ["| program | dtype | kernel | registers | spilled bytes | shared memory |", "| --- " * 6 + "|"]
    print(*lines, sep="\n", flush=True)
    for case in cases_of(options):
        for dtype in options.dtype:
            for kernel in kernels_of(case, dtype, options.target, options.plugin):
                cells = [case, dtype, kernel.name, kernel.registers, kernel.spill_bytes, f"{kernel.shared_bytes:,}"]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
                print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
