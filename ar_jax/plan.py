"""What a run will need: python -m ar_jax.plan --config=FILE.py[:variant] [--topology=v5p:4x4x4] [--mesh=fsdp=32,tensor=2].

Without a topology it prints every parameter with its sharding and its bytes on a device of the mesh. With one it compiles
the real training step (with --sample the real sampling loop) for that pod, on any machine, and prints its memory, FLOPs,
collectives, and bounds of its speed. --batch=N is config.train.batch_size; --fit tries smaller batches, rematerialisation
and other meshes and prints them, the best first; --json prints one object instead of tables. Config overrides as usual.

Topologies of TPUs are those of libtpu: v5e:16x16, v5p:4x4x8, v6e:16x16, ... Of GPUs they tell how many: h100:8, a100:64
(nodes of 8). The compiler has to be installed; docs/pods.md tells how.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from ar_jax import command
from ar_jax.analysis.hlo import Collective, Program
from ar_jax.config import UsageError
from ar_jax.training.chips import GIB, Chip
from ar_jax.training.mesh import AXES, make_mesh
from ar_jax.training.paths import named_leaves
from ar_jax.training.program import make_program
from ar_jax.training.sharding import batch_sharding, num_batch_shards, replicated
from ar_jax.training.topologies import compiler_options, environment, topology_devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program needs on each chip of a pod.

    Attributes:
      mesh: size of each axis.
      batch_size: over all devices.
      remat: what is computed again in the backward pass; see `BlockOptions`.
      memory: bytes by kind; "total" is all of them at once.
      fits: whether that is within a chip's memory.
      model_flops: of the whole batch; of a training step three times those of the loss. None where they cannot be counted.
      compute_seconds: what these take where all matrix units are busy.
      compiler_seconds: the compiler's own estimate, Pallas kernels and collectives left out; of GPUs only what fusions take
        to read and write memory, see `hlo.Program.seconds`. None where it tells none.
      collective_seconds: what a chip sends, by the speed of its links; or to other nodes, by that of the network.
      collectives: by kind and axes.
      kernels: how often each Pallas kernel runs, by its name.
      warnings: sentences.
    """

    mesh: dict[str, int]
    batch_size: int
    remat: str
    memory: dict[str, int]
    fits: bool
    model_flops: int | None
    compute_seconds: float | None
    compiler_seconds: float | None
    collective_seconds: float
    collectives: list[Collective]
    kernels: dict[str, int]
    warnings: list[str]

    @property
    def bound_seconds(self) -> float:
        """No step is faster: the longest of the three, as if they went on side by side."""
        return max(self.compute_seconds or 0.0, self.compiler_seconds or 0.0, self.collective_seconds)

    @property
    def mfu_bound(self) -> float | None:
        """No larger share of the matrix units' FLOP/s can be used."""
        return None if self.compute_seconds is None else self.compute_seconds / self.bound_seconds


def batch_shapes(system: Any, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch [B, ...] as the data gives it, by its facts alone."""
    facts = system.facts
    key = getattr(system.tokenizer, "data_key", "image")
    dtype = jnp.int32 if facts.modality == "text" else jnp.float32
    shapes = {key: jax.ShapeDtypeStruct((batch_size, *facts.shape), dtype)}
    if facts.label_names:
        shapes["label"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return shapes


def plan_training(config: Any, facts: Any, chip: Chip, devices: Sequence[Any]) -> Plan:
    """Compiles the training step of a config for these devices."""
    system = _system(config, facts)
    program = _program(system, config, devices)
    batch_size = program.train.batch_size
    batch = batch_shapes(system, batch_size)
    compiled, text = _compiled(program.mesh, lambda options: program.compile(batch, options))

    count = program.model_flops(batch)
    remat = str(dict(config.model).get("remat", "none"))
    return _plan(compiled, text, program.mesh, chip, batch_size, remat, count)


def plan_sampling(config: Any, facts: Any, chip: Chip, devices: Sequence[Any], batch_size: int) -> Plan:
    """Compiles the sampling loop of a config for these devices, `batch_size` examples at a time."""
    system = _system(config, facts)
    program = _program(system, config, devices)
    mesh = program.mesh
    rows = batch_sharding(mesh)

    def draw(params: Any, labels: Any, drop: Any, drawing: Any) -> jax.Array:
        return system.sample(params, jax.random.key(0), labels if facts.label_names else None, drop, drawing)

    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows)
    drop = jax.ShapeDtypeStruct((batch_size,), jnp.bool_, sharding=rows)
    everywhere = replicated(mesh)
    drawing = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=everywhere), system.drawing()
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(draw, out_shardings=rows).lower(program.shapes.params, labels, drop, drawing)
        compiled, text = _compiled(mesh, lowered.compile)
    return _plan(compiled, text, mesh, chip, batch_size, "none", None)


def fits(config: Any, facts: Any, chip: Chip, devices: Sequence[Any]) -> list[Plan]:
    """Plans of the config's batch and of smaller ones, with and without rematerialisation, over several meshes.

    The first is the one that fits and trains the most examples a second by its bound.
    """
    found: list[Plan] = []
    whole = int(config.train.batch_size)
    for mesh in _meshes(len(devices)):
        for remat in ("none", "dots_with_no_batch_dims", "full"):
            for batch_size in (whole, whole // 2, whole // 4):
                tried = ConfigDict(config.to_dict())
                tried.mesh, tried.train.batch_size, tried.model.remat = mesh, batch_size, remat
                try:
                    plan = plan_training(tried, facts, chip, devices)
                except UsageError:  # an axis that does not divide, or no room
                    continue
                found.append(plan)
                if plan.fits:
                    break
    return sorted(found, key=lambda plan: (not plan.fits, plan.bound_seconds / plan.batch_size))


def _compiled(mesh: Any, compile_it: Callable[[Any], Any]) -> tuple[Any, str]:
    """The program and its text; UsageError where the compiler sees that it has no room."""
    with tempfile.TemporaryDirectory() as folder:
        options = compiler_options(mesh.devices.flatten())
        try:
            compiled = compile_it(options or {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            said = str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
            raise UsageError(
                f"It does not fit: {said} Use a smaller --batch, more chips, or another --mesh; --fit looks for them."
            ) from error
        try:
            return compiled, compiled.as_text()
        except jax.errors.JaxRuntimeError:  # seen on v5p and v6e: the runtime cannot read back what its compiler wrote
            files = Path(folder).glob("*.after_codegen.txt")
            return compiled, max(files, key=lambda file: file.stat().st_size).read_text()


def parameters(config: Any, facts: Any, devices: Sequence[Any] | None = None) -> list[tuple[str, list[int], str, int]]:
    """Name, shape, sharding and bytes on a device of every parameter."""
    program = _program(_system(config, facts), config, devices)
    rows = []
    for name, leaf in named_leaves(program.shapes.params).items():
        own = leaf.sharding.shard_shape(leaf.shape)
        spec = ", ".join(str(axis) for axis in leaf.sharding.spec) or "whole"
        rows.append((name, list(leaf.shape), spec, math.prod(own) * leaf.dtype.itemsize))
    return rows


def _meshes(count: int) -> list[dict[str, int]]:
    """Fully sharded, and with a few of the devices for heads or copies."""
    meshes: list[dict[str, int]] = [{"fsdp": count}]
    meshes += [{"fsdp": count // n, "tensor": n} for n in (2, 4) if count % n == 0]
    meshes += [{"data": n, "fsdp": count // n} for n in (4,) if count % n == 0]
    return meshes


def _system(config: Any, facts: Any) -> Any:
    from ar_jax.run import system_of

    return system_of(config, facts)


def _program(system: Any, config: Any, devices: Sequence[Any] | None) -> Any:
    if devices is None:
        return make_program(system, config)
    axes = {name: size for name, size in dict(config.get("mesh") or {"data": -1}).items() if name != "rules"}
    return make_program(system, config, make_mesh(axes, devices))


def _plan(compiled: Any, text: str, mesh: Any, chip: Chip, batch_size: int, remat: str, count: int | None) -> Plan:
    analysis = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # donated arguments are written in place
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
        "new outputs": outputs,
        "program": analysis.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values())
    program = Program(text)
    sizes = {name: int(size) for name, size in mesh.shape.items()}
    collectives = program.collectives(sizes, chip.node)
    collective_seconds = sum(row.bytes for row in collectives) / chip.links
    if across := sum(row.across for row in collectives):
        collective_seconds = max(collective_seconds, across / chip.network)
    return Plan(
        mesh=sizes,
        batch_size=batch_size,
        remat=remat,
        memory=memory,
        fits=memory["total"] <= chip.memory,
        model_flops=count,
        compute_seconds=None if count is None else count / (mesh.size * chip.flops),
        compiler_seconds=program.seconds(chip.clock),
        collective_seconds=collective_seconds,
        collectives=collectives,
        kernels=program.kernels(),
        warnings=_replicated(program, mesh, batch_size) + _reserved(memory["total"], chip),
    )


def _replicated(program: Program, mesh: Any, batch_size: int) -> list[str]:
    """A sentence on the largest array of a device that has the whole batch, though the batch is cut."""
    if num_batch_shards(mesh) == 1:
        return []
    own = batch_size // num_batch_shards(mesh)
    whole = [
        (size, shape, line)
        for shape, size, line in program.arrays()
        if len(shape) > 2 and batch_size in shape and size > 2**24 and batch_size not in shape[-1:] and own not in shape
    ]
    if not whole:
        return []
    size, shape, line = max(whole, key=lambda row: row[0])
    name = line.split('op_name="')[1].split('"')[0] if 'op_name="' in line else line.split("=")[0].strip()
    return [
        f"An array of shape {list(shape)} ({size / GIB:.2f} GiB) has the whole batch on each device: {name}; it may be "
        "replicated by accident."
    ]


def _reserved(total: int, chip: Chip) -> list[str]:
    """A sentence where the plan fits a GPU, but not the share of its memory that JAX takes at first."""
    if not chip.is_gpu or not 0.75 * chip.memory < total <= chip.memory:
        return []
    return ["JAX takes three quarters of a GPU's memory; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 to run this."]


def report(plan: Plan, chip: Chip) -> str:
    """The plan for people to read."""
    lines = [
        f"mesh: {_sizes(plan.mesh)}; batch {plan.batch_size}; remat {plan.remat}",
        f"memory of a chip: {plan.memory['total'] / GIB:.2f} of {chip.memory / GIB:.0f} GiB ("
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.memory.items() if name != "total")
        + f"): {'fits' if plan.fits else 'does NOT fit'}",
    ]
    if plan.model_flops is not None:
        lines.append(f"FLOPs of the model: {plan.model_flops:.3g}, {plan.compute_seconds:.4g} s at the chips' peak")
    of = "what fusions take to read and write memory" if chip.is_gpu else "all but kernels and collectives"
    told = "none" if plan.compiler_seconds is None else f"{plan.compiler_seconds:.4g} s"
    lines += [
        f"compiler's estimate of {of}: {told}",
        f"collectives, at the links' peak: {plan.collective_seconds:.4g} s",
        f"no faster than {plan.bound_seconds:.4g} s"
        + (f", so model FLOPs utilisation is at most {plan.mfu_bound:.0%}" if plan.mfu_bound is not None else ""),
    ]
    lines += [
        f"  {row.kind} over {row.axes}: {row.count} times, {row.bytes / 2**20:.1f} MiB sent"
        + (f", {row.across / 2**20:.1f} MiB to other nodes" if row.across else "")
        for row in plan.collectives
    ]
    lines += [f"  kernel {name}: {count} times" for name, count in plan.kernels.items()]
    lines += [f"warning: {sentence}" for sentence in plan.warnings]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return dataclasses.asdict(plan) | {"bound_seconds": plan.bound_seconds, "mfu_bound": plan.mfu_bound}


def _sizes(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items())


def parse_mesh(text: str) -> dict[str, int]:
    """{"fsdp": 32, "tensor": 2} from "fsdp=32,tensor=2".

    Raises:
      UsageError: anything else.
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.lstrip("-").isdigit():
            raise UsageError(f"--mesh={text} should be such as fsdp=32,tensor=2, with axes among {', '.join(AXES)}.")
        mesh[name] = int(size)
    return mesh


def main(arguments: Sequence[str]) -> None:
    """The command."""
    from ar_jax.run import load_facts

    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, "the pod to compile for", flag_values=values)
    flags.DEFINE_string("mesh", None, "axes and sizes in place of config.mesh", flag_values=values)
    flags.DEFINE_integer("batch", None, "in place of config.train.batch_size", flag_values=values, lower_bound=1)
    flags.DEFINE_bool("sample", False, "the sampling loop in place of the training step", flag_values=values)
    flags.DEFINE_bool("fit", False, "look for batch, rematerialisation and mesh", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    left = values(arguments, known_only=True)
    config, _ = command.parse([*left, "--workdir="])
    if values.mesh:
        config.mesh = parse_mesh(values.mesh)
    if values.batch:
        config.train.batch_size = values.batch
    facts = load_facts(config)
    if values.topology is None:
        rows = parameters(config, facts)
        total = sum(row[3] for row in rows)
        if values.json:
            names = ("name", "shape", "sharding", "bytes_per_device")
            print(
                json.dumps(
                    {"parameters": [dict(zip(names, row, strict=True)) for row in rows], "bytes_per_device": total}
                )
            )
            return
        for name, shape, spec, size in rows:
            print(f"{name}  {shape}  {spec}  {size:,} bytes")
        print(f"{len(rows)} parameters, {total / 2**20:.1f} MiB on a device")
        return
    chip, devices = topology_devices(values.topology)
    if values.fit:
        plans = fits(config, facts, chip, devices)
    elif values.sample:
        plans = [plan_sampling(config, facts, chip, devices, values.batch or int(dict(config.eval)["batch_size"]))]
    else:
        plans = [plan_training(config, facts, chip, devices)]
    if not plans:
        raise UsageError(
            f"Nothing that was tried compiles for {values.topology}; try a larger one, or a smaller batch."
        )
    print(json.dumps([as_json(plan) for plan in plans]) if values.json else "\n\n".join(report(p, chip) for p in plans))


if __name__ == "__main__":
    environment()
    command.call(main)
