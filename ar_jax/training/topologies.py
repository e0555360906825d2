"""Devices that are not here, to compile for: TPUs by libtpu, NVIDIA's GPUs by JAX's plugin for CUDA."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ar_jax.config import UsageError, nearest
from ar_jax.training.chips import CHIPS, Chip

# What the compiler asks of a GPU besides CHIPS, by NVIDIA's data sheets and the tables of compute capabilities in the CUDA
# programming guide: compute capability, multiprocessors, float32 units and bytes of shared memory of each, the most of it
# that a block may have, bytes of the second-level cache. The instructions that only Hopper has are a feature of their own.
_GPUS = {
    "a100": ("major: 8", 108, 64, 167936, 166912, 41943040),
    "h100": ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 233472, 232448, 52428800),
}
# XLA's text form of a target configuration; what all of _GPUS have in common stands here.
_TARGET = """gpu_device_info {{
  name: "{name}" cuda_compute_capability {{ {capability} }}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  device_memory_size: {memory:.0f} memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache}
  shared_memory_per_core: {shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def environment() -> None:
    """Called before JAX looks for devices: it stays on the CPU, and its compilers for others are content without them."""
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if library := os.environ.get("AR_JAX_LIBTPU"):
        os.environ.setdefault("TPU_LIBRARY_PATH", library)
    if plugin := os.environ.get("AR_JAX_CUDA"):  # a folder of its own, where no other run of JAX finds it
        sys.path.append(plugin)


def topology_devices(name: str) -> tuple[Chip, Sequence[Any]]:
    """The chips of a pod, or of nodes of GPUs, that are not here.

    Args:
      name: a shape of libtpu such as "v5p:4x4x4"; or how many GPUs, such as "h100:8": all of one node, or several whole ones.

    Raises:
      UsageError: an unknown chip or shape, or its compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UsageError(f"--topology={name} names chip {kind!r}.{nearest(kind, CHIPS)} Known: {', '.join(CHIPS)}.")
    chip = CHIPS[kind]
    return chip, _gpus(name, kind, chip, shape) if chip.is_gpu else _tpus(name)


def compiler_options(devices: Sequence[Any]) -> dict[str, str | bool | int]:
    """What the compiler has to be told for such devices, by the names of XLA's flags."""
    if devices[0].platform != "gpu":
        return {}
    return {
        "xla_gpu_cuda_data_dir": str(_cuda_folder()),
        "xla_gpu_autotune_level": 0,  # there is nothing to try things on
        "xla_gpu_enable_triton_gemm": False,  # without trying, it takes tiles for them that are slow or do not fit
        # Estimates of each fusion, which the TPU's compiler always tells; this one refuses to for an A100.
        "xla_gpu_collect_cost_model_stats": "A100" not in devices[0].device_kind,
    }


def _tpus(name: str) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu's own errors have no type
        raise UsageError(
            f"--topology={name} cannot be had ({str(error).splitlines()[0]}); pip install 'ar_jax[tpu]' brings the "
            "TPU compiler, and shapes are such as v5e:16x16 or v5p:4x4x4."
        ) from error


def _gpus(name: str, kind: str, chip: Chip, shape: str) -> Sequence[Any]:
    count = int(shape) if shape.isdecimal() else 0
    if count < 1 or (count > chip.node and count % chip.node):
        raise UsageError(
            f"--topology={name} should tell how many GPUs, such as {kind}:{chip.node}: at most {chip.node} of one node, "
            f"or a multiple of {chip.node}."
        )
    _cuda_folder()
    from jax.experimental import topologies

    nodes, each = max(1, count // chip.node), min(count, chip.node)
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_target(kind, chip), topology=f"{nodes}x1x{each}"
        )
    except Exception as error:  # where there is no plugin, and the plugin's own
        raise UsageError(f"--topology={name} cannot be had ({str(error).splitlines()[0]}). {_install()}") from error
    return found.devices


def _target(kind: str, chip: Chip) -> str:
    capability, cores, units, shared, optin, cache = _GPUS[kind]
    return _TARGET.format(
        name=chip.kind.removesuffix(".*"),
        clock=chip.clock / 1e9,
        memory=chip.memory,
        bandwidth=chip.bandwidth,
        **dict(capability=capability, cores=cores, units=units, shared=shared, optin=optin, cache=cache),
    )


def _cuda_folder() -> Path:
    """Where the device library and assembler of CUDA's compiler are, as pip installs them."""
    for folder in map(Path, sys.path):
        if (folder / "nvidia" / "cuda_nvcc").is_dir() and (folder / "jax_plugins").is_dir():
            return folder / "nvidia" / "cuda_nvcc"
    raise UsageError(f"There is no compiler for NVIDIA's GPUs. {_install()}")


def _install() -> str:
    version = jax.__version__
    return (
        f"Install it into a folder of its own (1.2 GB): pip install --no-deps --target DIR jax-cuda12-plugin=={version} "
        f"jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12, and set AR_JAX_CUDA=DIR."
    )
