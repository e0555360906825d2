"""Several processes are one run: the same parameters, and a dead one ends all, after which any number goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ar_jax
from ar_jax.config import UsageError
from ar_jax.training import hosts
from ar_jax.training.paths import named_leaves
from ar_jax.training.termination import EXIT_CODE

ROOT = Path(__file__).parents[2]
RUN = ["--config=configs/digits.py:smoke", "--config.checkpoint.every_steps=10", "--config.train.num_steps=60"]


@pytest.mark.parametrize(
    "told",
    [
        dict(num_processes=2),
        dict(process=0),
        dict(coordinator="host", num_processes=2, process=0),
        dict(coordinator="host:1", num_processes=2, process=2),
        dict(coordinator="host:1", num_processes=2),
    ],
)
def test_half_an_address_is_refused_before_anything_is_waited_for(told) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        hosts.join(**told)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
    ],
)
def test_slurm_tells_of_the_others(environment, several, monkeypatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.several_by_environment() == several


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def start(workdir: Path, count: int) -> list[subprocess.Popen[str]]:
    """`count` processes of two devices altogether."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // count}", "JAX_PLATFORMS": "cpu"}
    command, port = [sys.executable, "train.py", *RUN, f"--workdir={workdir}"], free_port()
    told = [[f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={i}"] for i in range(count)]
    return [
        subprocess.Popen(
            [*command, *(own if count > 1 else [])], cwd=ROOT, env=os.environ | flags,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for own in told
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-2000:]


def until_step_20(workdir: Path, processes: list[subprocess.Popen[str]]) -> None:
    while not (workdir / "checkpoints" / "20").is_dir():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    run = ar_jax.load(workdir)
    assert run.step == 60
    return {name: np.asarray(leaf) for name, leaf in named_leaves(run.params).items()}


@pytest.mark.slow
def test_two_processes_are_one_run_and_when_one_is_killed_the_other_ends_and_one_goes_on(tmp_path) -> None:
    finish(start(tmp_path / "one", 1))
    finish(start(tmp_path / "two", 2))
    killed = start(tmp_path / "killed", 2)
    until_step_20(tmp_path / "killed", killed)
    killed[1].send_signal(signal.SIGKILL)
    killed[1].communicate()
    _, errors = killed[0].communicate(timeout=3 * hosts.TIMEOUT)
    assert killed[0].returncode != 0 and errors
    finish(start(tmp_path / "killed", 1))
    alone = parameters(tmp_path / "one")
    for name in ("two", "killed"):
        for leaf, values in parameters(tmp_path / name).items():
            np.testing.assert_array_equal(values, alone[leaf], err_msg=f"{name}: {leaf}")


@pytest.mark.slow
def test_sigterm_to_one_process_saves_one_step_in_all_and_ends_all(tmp_path) -> None:
    told = start(tmp_path, 2)
    until_step_20(tmp_path, told)
    told[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=300)[1] for process in told]
    assert [process.returncode for process in told] == [EXIT_CODE] * 2, errors
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert all(f"SIGTERM: saved step {saved} of 60" in error for error in errors)
