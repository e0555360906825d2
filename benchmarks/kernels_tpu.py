"""Kernels compiled for TPUs that are not here, and their cycles: python benchmarks/kernels_tpu.py [--cycles] [--markdown FILE].

Each case is compiled ahead of time by the real TPU compiler (libtpu: `make test` installs it into .cache; else name it by
AR_JAX_LIBTPU=FILE), forward and backward, on any machine. With --cycles each case's schedule is read (see tpu_cycles.py)
and set beside the least that its memory traffic takes. Arguments choose kernels, chips, lengths and head widths.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

HEADS = 8
# Topology, bytes a cycle from HBM: v5e 819 GB/s at 1.5 GHz, v5p 2765 GB/s at 1.75 GHz for two cores, v6e 1640 GB/s at 1.75 GHz.
CHIPS = {"v5e": ("v5e:2x2", 819 / 1.5), "v5p": ("v5p:2x2x1", 2765 / 1.75 / 2), "v6e": ("v6e:2x2", 1640 / 1.75)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile.

    Attributes:
      kernel: what is called.
      direction: "forward", "backward" (which runs the forward kernel first), or "decode".
      length: tokens.
      head_dim: H.
    """

    kernel: str
    direction: str
    length: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.kernel}, {self.direction}, {self.length} x {self.head_dim}"


def libtpu() -> Path | None:
    """The TPU compiler's file, or None where there is none."""
    named = os.environ.get("AR_JAX_LIBTPU")
    files = [Path(named)] if named else sorted((ROOT / ".cache").glob("libtpu-*/libtpu/libtpu.so"))
    return next((file for file in reversed(files) if file.is_file()), None)


def environment(dump: str | None = None) -> dict[str, str]:
    """What the environment of a process that compiles for TPUs must hold; it writes schedules into `dump`."""
    settings = dict(
        TPU_LIBRARY_PATH=str(libtpu()),
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        JAX_ENABLE_COMPILATION_CACHE="false",
        XLA_FLAGS="",  # the CPU's: the TPU's compiler refuses what it does not know
    )
    if dump:
        settings["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return os.environ | settings


def _step_attention(case: Case) -> tuple[Callable[..., Any], list[Any]]:
    import jax.numpy as jnp

    from ar_jax.kernels.step_attention import step_attention

    queries = 1 if case.direction == "decode" else case.length
    shapes = [_shape(queries, case.head_dim), *[_shape(case.length, case.head_dim)] * 2]
    return step_attention, [*shapes, ((1, queries), jnp.int32), ((1, case.length), jnp.int32)]


def _linear_attention(decay: str) -> Callable[[Case], tuple[Callable[..., Any], list[Any]]]:
    def build(case: Case) -> tuple[Callable[..., Any], list[Any]]:
        import jax.numpy as jnp

        from ar_jax.kernels.linear_attention import linear_attention

        tokens = (1, 1 if case.direction == "decode" else case.length, HEADS)
        shapes = [_shape(tokens[1], case.head_dim)] * 3
        sizes = {"none": None, "head": (HEADS,), "step": tokens, "channel": (*tokens, case.head_dim)}
        if case.direction == "decode":
            shapes.append(((1, HEADS, case.head_dim, case.head_dim), jnp.float32))
        if sizes[decay] is None:
            return lambda q, k, v, *state: linear_attention(q, k, v, initial_state=state[0] if state else None), shapes
        return (
            lambda q, k, v, *rest: linear_attention(
                q, k, v, log_decay=rest[-1], initial_state=rest[0] if len(rest) > 1 else None
            ),
            [*shapes, (sizes[decay], jnp.float32)],
        )

    return build


def _delta_attention(case: Case) -> tuple[Callable[..., Any], list[Any]]:
    import jax.numpy as jnp

    from ar_jax.kernels.delta_attention import delta_attention

    tokens = ((1, case.length, HEADS), jnp.float32)
    shapes = [*[_shape(case.length, case.head_dim)] * 3, tokens, tokens]
    return lambda q, k, v, beta, log_decay: delta_attention(q, k, v, beta, log_decay=log_decay), shapes


def _dplr_attention(case: Case) -> tuple[Callable[..., Any], list[Any]]:
    import jax.numpy as jnp

    from ar_jax.kernels.delta_attention import dplr_attention

    decay = ((1, case.length, HEADS, case.head_dim), jnp.float32)
    shapes = [*[_shape(case.length, case.head_dim)] * 5, decay]
    return lambda q, k, v, a, b, log_decay: dplr_attention(q, k, v, a, b, log_decay=log_decay), shapes


def _selective_scan(case: Case) -> tuple[Callable[..., Any], list[Any]]:
    import jax.numpy as jnp

    from ar_jax.kernels.selective_scan import selective_scan

    width, states = HEADS * case.head_dim, 16
    x, wide = ((1, case.length, width), jnp.bfloat16), ((1, case.length, width), jnp.float32)
    return selective_scan, [x, wide, ((width, states), jnp.float32), *[((1, case.length, states), jnp.float32)] * 2]


def _selected_attention(case: Case) -> tuple[Callable[..., Any], list[Any]]:
    """A token whose key heads each name 32 blocks of 64, in a cache that has a head's keys behind one another."""
    import jax.numpy as jnp

    from ar_jax.kernels.selected_attention import selected_attention

    queries = 1 if case.direction == "decode" else case.length
    cache, q = ((1, HEADS, case.length, case.head_dim), jnp.bfloat16), (1, queries, 4 * HEADS, case.head_dim)
    named = ((1, queries, HEADS, 32), jnp.int32)

    def attend(q: Any, k: Any, v: Any, begin: Any, limit: Any) -> Any:
        k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
        return selected_attention(q, k, v, begin, limit, block_size=64, aligned=True)

    return attend, [(q, jnp.bfloat16), cache, cache, named, ((1, queries), jnp.int32)]


KERNELS: dict[str, Callable[[Case], tuple[Callable[..., Any], list[Any]]]] = {
    "step_attention": _step_attention,
    "linear_attention": _linear_attention("none"),
    "linear_attention, decay per head": _linear_attention("head"),
    "linear_attention, decay per step": _linear_attention("step"),
    "linear_attention, decay per channel": _linear_attention("channel"),
    "delta_attention": _delta_attention,
    "dplr_attention": _dplr_attention,
    "selective_scan": _selective_scan,
    "selected_attention": _selected_attention,
}


def directions(kernel: str) -> tuple[str, ...]:
    """What there is to compile of a kernel: single tokens have a form of their own, or are all that it is for."""
    if kernel == "selected_attention":
        return ("decode",)
    return ("forward", "backward", *(["decode"] if kernel.startswith(("step", "linear")) else []))


def _shape(length: int, head_dim: int) -> tuple[tuple[int, ...], Any]:
    import jax.numpy as jnp

    return (1, length, HEADS, head_dim), jnp.bfloat16


def compile_case(case: Case, chip: str) -> Any:
    """The compiled program, a `jax.stages.Compiled`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0])
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    function, shapes = KERNELS[case.kernel](case)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, PartitionSpec())) for shape in shapes]

    def loss(*arrays: Any) -> jax.Array:
        leaves = jax.tree.leaves(function(*arrays))
        return sum(leaf.astype(jnp.float32).sum() for leaf in leaves)

    floats = tuple(i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating))
    program = jax.grad(loss, argnums=floats) if case.direction == "backward" else function
    with jax.set_mesh(mesh):
        return jax.jit(program).lower(*arguments).compile()


def cycles_of(case: Case, chip: str) -> dict[str, int]:
    """Cycles of each part of the program, by its name; compiled in a process of its own."""
    from tpu_cycles import schedules

    with tempfile.TemporaryDirectory() as folder:
        compile_apart([case], chip, folder)
        return {name: schedule.cycles for name, schedule in schedules(Path(folder)).items()}


def compile_apart(cases: list[Case], chip: str, dump: str | None = None) -> list[int]:
    """Compiles cases in one process of their own; RuntimeError with what the compiler said if one is refused.

    Returns: bytes that the operations of each program move between chip and memory, by XLA's count, Pallas kernels left out.
    """
    told = json.dumps([dataclasses.astuple(case) for case in cases])
    command = [sys.executable, __file__, "--compile", chip, told]
    done = subprocess.run(command, env=environment(dump), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{', '.join(map(str, cases))} on {chip}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def traffic(case: Case) -> int:
    """The least bytes that a forward program moves: every input once, every output once."""
    import jax
    import jax.numpy as jnp

    function, shapes = KERNELS[case.kernel](case)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    arrays = [*arguments, *jax.tree.leaves(jax.eval_shape(function, *arguments))]
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in arrays)


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """The cases that the arguments choose."""
    for kernel in KERNELS:
        if options.kernel in kernel:
            for length in options.length:
                for head_dim in options.head_dim:
                    for direction in options.direction:
                        if direction in directions(kernel):
                            yield Case(kernel, direction, length, head_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="only kernels whose names contain this")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--length", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--direction", nargs="+", default=["forward", "backward", "decode"])
    parser.add_argument("--cycles", action="store_true", help="read the schedules, too")
    parser.add_argument("--markdown", type=Path, help="FILE.md to write the table to")
    parser.add_argument("--compile", nargs=2, metavar=("CHIP", "CASES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        programs = [compile_case(Case(*case), options.compile[0]) for case in json.loads(options.compile[1])]
        print(json.dumps([int(program.cost_analysis()["bytes accessed"]) for program in programs]))
        return
    if libtpu() is None:
        sys.exit("The TPU's compiler is not here; `make test` installs it, or set AR_JAX_LIBTPU to a libtpu.so.")
    os.environ["JAX_PLATFORMS"] = "cpu"
    head = [
        "program",
        "chip",
        "kernels",
        "cycles",
        "of what XLA does around them",
        "bound by memory",
        "kernels / bound",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    print(*lines, sep="\n", flush=True)
    for case in cases_of(options):
        for chip in options.chip:
            if options.cycles:
                found = cycles_of(case, chip)
                own = {name: n for name, n in found.items() if case.kernel.split(",")[0] in name}
                kernels, around = sum(own.values()), sum(found.values()) - sum(own.values())
                bound = traffic(case) / CHIPS[chip][1]
                ratio = f"{kernels / bound:.2f}" if case.direction != "backward" else ""
                names = ", ".join(f"{name} {n:,}" for name, n in own.items())
                cells = [names, f"{kernels:,}", f"{around:,}", f"{bound:,.0f}", ratio]
            else:
                (moved,) = compile_apart([case], chip)
                counts = case.direction == "decode" and case.kernel.startswith(
                    "linear"
                )  # the others are Pallas kernels
                told = f"moves {moved / traffic(case):.2f} times the least" if counts else ""
                cells = ["compiles", "", told, *[""] * 2]
            lines.append("| " + " | ".join([str(case), chip, *cells]) + " |")
            print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
