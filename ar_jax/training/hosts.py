"""Several processes as one run: each on a host of its own, or many on one host."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from ar_jax.config import UsageError

TIMEOUT = 60  # seconds without a sign of life after which a process counts as dead, and the others end


def join(coordinator: str = "", num_processes: int = 0, process: int = -1) -> None:
    """Makes this process one of those of a run; to be called before anything of JAX is.

    On TPU pods and under Slurm the environment tells who the others are. Elsewhere each process is told. When one of them
    dies, or is not heard of for TIMEOUT seconds, all others end with an error that says so; the same command, started
    anew on all hosts, goes on from the last checkpoint.

    Args:
      coordinator: HOST:PORT of the first process; "" takes what the environment tells, if it does.
      num_processes: of the run.
      process: the number of this one, from 0.

    Raises:
      UsageError: some of the three are given and others are not, or they make no sense.
    """
    if not coordinator:
        if num_processes or process >= 0:
            raise UsageError("--processes and --process go with --coordinator=HOST:PORT, the first process's address.")
        if several_by_environment():
            jax.distributed.initialize(heartbeat_timeout_seconds=TIMEOUT)
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 <= process < num_processes:
        raise UsageError(
            f"--coordinator={coordinator} --processes={num_processes} --process={process} should be HOST:PORT, the number "
            "of processes, and which of them this one is, from 0."
        )
    jax.distributed.initialize(coordinator, num_processes, process, heartbeat_timeout_seconds=TIMEOUT)


def several_by_environment() -> bool:
    """Whether this is one of several processes, by what Slurm or a TPU's machine tells."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return True
    platforms = os.environ.get("JAX_PLATFORMS", "")
    has_tpu = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    return has_tpu and platforms in ("", "tpu", "tpu,cpu") and "TPU_SKIP_MDS_QUERY" not in os.environ
