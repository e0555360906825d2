"""Several processes are one run: the same parameters, and a dead one ends all, after which any number goes on."""

from __future__ import annotations

import json
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
CLASSIFIER = "--config.eval.samples.classifier"


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


def start(
    workdir: Path, count: int, *extra: str, devices: int = 2, script: str = "train.py"
) -> list[subprocess.Popen[str]]:
    """`count` processes of so many devices altogether."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}", "JAX_PLATFORMS": "cpu"}
    port = free_port()
    command = [sys.executable, script, *(RUN if script == "train.py" else []), *extra, f"--workdir={workdir}"]
    told = [[f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={i}"] for i in range(count)]
    return [
        subprocess.Popen(
            [*command, *(own if count > 1 else [])], cwd=ROOT, env=os.environ | flags,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for own in told
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What all have said, once they have ended well."""
    said = []
    for process in processes:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-2000:]
        said.append(output)
    return said


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


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(2, {"tensor": 2}), (4, {"fsdp": 2, "tensor": 2})], ids=str)
def test_processes_that_share_rows_of_a_batch_read_the_same(tmp_path, count, mesh) -> None:
    """Heads are cut over processes, so each row of a batch is needed in two of them."""
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    finish(start(tmp_path / "one", 1, *axes, devices=count))
    finish(start(tmp_path / "many", count, *axes, devices=count))
    alone, together = parameters(tmp_path / "one"), parameters(tmp_path / "many")
    for leaf, values in together.items():
        np.testing.assert_allclose(values, alone[leaf], atol=1e-5, err_msg=leaf)


@pytest.mark.slow
def test_two_processes_evaluate_what_one_would(tmp_path) -> None:
    """Likelihoods, and samples judged by features, whose images are drawn half by each process."""
    workdir, classifier = tmp_path / "run", tmp_path / "classifier"
    finish(start(workdir, 1))
    made = [
        "-m",
        "ar_jax.evaluation.classifier",
        "--config=configs/digits.py:smoke",
        f"--out={classifier}",
        "--steps=30",
    ]
    subprocess.run([sys.executable, *made], cwd=ROOT, check=True, capture_output=True)
    asked = ["--config.eval.samples.num_samples=90", f"{CLASSIFIER}={classifier}"]
    found = []
    for count in (1, 2):
        (said, *others) = finish(start(workdir, count, *asked, script="eval.py"))
        assert not any("eval:" in other for other in others)  # one process speaks for all
        found.append(json.loads(said.splitlines()[-1]))
        assert json.loads((workdir / "eval/metrics.json").read_text()) == found[-1]
    one, two = found
    assert one["bits_per_dim"] == pytest.approx(two["bits_per_dim"], abs=1e-6)
    assert one["token_error_rate"] == pytest.approx(two["token_error_rate"], abs=1e-3)
    for name in ("FID", "spatial_FID", "class_accuracy", "precision", "recall", "nearest_train_rms"):
        assert one["samples"][name] == pytest.approx(two["samples"][name], rel=1e-3), name
