"""The largest landmarks' training steps, compiled for TPU pods: python benchmarks/pods.py [--only NAME ...] [--out docs].

Writes pods_planned.md: memory of a chip, FLOPs, bounds of speed and collectives, as `python -m ar_jax.plan` finds them, which
needs libtpu ($AR_JAX_LIBTPU, or installed); and how long depth takes to compile. Minutes each: a row is kept in .cache/pods
as soon as it is there, and --fresh makes all anew.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".cache" / "pods"
GIB = 2**30
# Name: the config, the pod, its name in the table, the mesh, the batch.
PODS: dict[str, tuple[str, str, str, str, int]] = {
    "LlamaGen-3B": ("configs/llamagen.py:3b_384", "v5e:16x16", "v5e-256", "data=2,fsdp=128", 256),
    "VAR-d30": ("configs/var.py:d30", "v5p:4x4x8", "v5p-128", "fsdp=128", 1024),
    "MAR-H": ("configs/mar.py:h", "v6e:16x16", "v6e-256", "fsdp=256", 2048),
}
COLUMNS = (
    *("system", "pod", "mesh", "batch", "memory of a chip, GiB", "fits", "FLOPs a step"),
    *("compute, ms", "compiler, ms", "links, ms", "mfu at most"),
)
DEPTHS = (16, 64)
DEEP = ("configs/llamagen.py:b_256", "v5e:4x4", "fsdp=16", 64)


def plan(config: str, topology: str, mesh: str, batch: int, *overrides: str) -> dict[str, Any]:
    """The plan of one training step, and the CPU seconds that it took."""
    command = [sys.executable, "-m", "ar_jax.plan", f"--config={config}", f"--topology={topology}", f"--mesh={mesh}"]
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [*command, f"--batch={batch}", "--json", *overrides], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.stderr.splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])[0] | {
        "seconds": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start
    }


def kept(name: str, fresh: bool, *arguments: Any) -> dict[str, Any]:
    """The row of this name, from the file of an earlier run unless `fresh`."""
    file = KEPT / f"{name}.json"
    if fresh or not file.exists():
        row = plan(*arguments)
        KEPT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    return json.loads(file.read_text())


def markdown(pods: dict[str, dict[str, Any]], depths: dict[int, dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "<!-- written by: python benchmarks/pods.py -->",
        "",
        "What the TPU's own compiler says of the largest published sizes' training steps, bfloat16 with float32 parameters, "
        "all layers rematerialised, on pods that were not there. `mfu` is the bound that follows from the slowest of "
        "compute, the compiler's estimate (kernels and collectives left out) and the links; no step reaches it.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join(['---'] * len(COLUMNS))} |",
    ]
    for name, row in pods.items():
        config, _, pod, _, batch = PODS[name]
        mesh = ", ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1)
        times = [f"{1e3 * row[key]:.0f}" for key in ("compute_seconds", "compiler_seconds", "collective_seconds")]
        cells = (
            f"{name} (`{config}`)",
            pod,
            mesh,
            batch,
            f"{row['memory']['total'] / GIB:.1f}",
            "yes" if row["fits"] else "no",
        )
        lines.append(
            f"| {' | '.join(map(str, cells))} | {row['model_flops']:.2e} | {' | '.join(times)} | {row['mfu_bound']:.0%} |"
        )
    lines += ["", "| system | collective | over | how often | sent by a chip, MiB |", "| --- | --- | --- | --- | --- |"]
    for name, row in pods.items():
        for part in row["collectives"]:
            lines.append(
                f"| {name} | {part['kind']} | {part['axes']} | {part['count']} | {part['bytes'] / 2**20:.0f} |"
            )
    for name, row in pods.items():
        lines += [f"\n{name}: {sentence}" for sentence in row["warnings"]]
    if len(depths) == len(DEPTHS):
        low, high = (depths[depth]["seconds"] for depth in DEPTHS)
        lines += [
            "",
            f"Compiling `{DEEP[0]}` for {DEEP[1]} with {DEPTHS[0]} and with {DEPTHS[1]} layers took "
            f"{low:.0f} and {high:.0f} CPU seconds, starting Python and tracing included: {high / low:.2f} times as long.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PODS, "depth"], default=[*PODS, "depth"], metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    pods, depths = {}, {}
    for name in (name for name in PODS if name in arguments.only):
        config, topology, _, mesh, batch = PODS[name]
        pods[name] = kept(name, arguments.fresh, config, topology, mesh, batch)
        print(f"{name}: {pods[name]['seconds']:.0f} s", flush=True)
    if "depth" in arguments.only:
        config, topology, mesh, batch = DEEP
        for depth in DEPTHS:
            own = f"--config.model.num_layers={depth}"
            depths[depth] = kept(f"depth {depth}", arguments.fresh, config, topology, mesh, batch, own)
            print(f"depth {depth}: {depths[depth]['seconds']:.0f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "pods_planned.md").write_text(markdown(pods, depths))


if __name__ == "__main__":
    main()
