"""The two commands as a user types them: train, evaluate, override, kill and go on."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import ar_jax
from ar_jax.evaluation.small import Small, write_small

ROOT = Path(__file__).parents[1]
TRAIN = [
    "train.py",
    "--config=configs/digits.py:smoke",
    "--config.order.kind=spiral",
    "--config.checkpoint.every_steps=8",
]
EVERY_METRIC = {
    "step",
    "bits_per_dim",
    "nll_nats_per_example",
    "token_error_rate",
    "tokens_per_second",
    "seconds_per_sample",
    "network_evaluations_per_sample",
}


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts a command in its own process, on one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> list[str]:
    """The lines of its standard output, once it has ended well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines()


def lines(workdir: Path) -> list[dict[str, float]]:
    """metrics.jsonl, without what the clock says."""
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "per_second" not in key and key != "seconds_per_step"}
        for line in read
    ]


def picture(file: Path) -> np.ndarray:
    """The pixels of a picture, [H, W, 3] uint8."""
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The directory of an undisturbed run, and what training said."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    return workdir, finish(start(*TRAIN, f"--workdir={workdir}"))


def test_training_says_what_it_will_do_and_leaves_what_it_should(trained):
    workdir, said = trained
    for name in ("parameters: ", "steps: 40 of 64 examples", "devices: 1 x", "mesh: data=1", "memory: "):
        assert any(line.startswith(name) for line in said), (name, said)
    assert any(line.startswith("step 40/40  loss ") and "examples/s  ETA" in line for line in said)
    assert said[-1].endswith(f"python eval.py --workdir={workdir}")
    assert {"config.json", "facts.json", "metrics.jsonl", "checkpoints"} <= {path.name for path in workdir.iterdir()}
    assert list(workdir.glob("tensorboard/events.*"))
    assert [line["step"] for line in lines(workdir)] == [20, 40]
    assert lines(workdir)[-1]["loss"] < 2.3 and lines(workdir)[-1]["eval/bits_per_dim"] < 3.5  # uniform: 2.83, 4.09


def test_eval_ends_with_its_metrics_and_writes_pictures(trained):
    workdir, _ = trained
    metrics = json.loads(finish(start("eval.py", f"--workdir={workdir}"))[-1])
    assert set(metrics) == EVERY_METRIC
    assert metrics == json.loads((workdir / "eval" / "metrics.json").read_text())
    assert metrics["step"] == 40 and metrics["network_evaluations_per_sample"] == 64
    assert metrics["bits_per_dim"] == pytest.approx(lines(workdir)[-1]["eval/bits_per_dim"], rel=1e-5)
    assert 0 < metrics["token_error_rate"] < 0.8  # sixteen of the seventeen levels would be wrong by chance
    assert metrics["nll_nats_per_example"] == pytest.approx(metrics["bits_per_dim"] * 64 * np.log(2))
    samples, growth = picture(workdir / "eval" / "samples.png"), picture(workdir / "eval" / "growth.png")
    assert samples.shape == (650, 600, 3)  # ten classes of eight
    assert growth.shape == (290, 840, 3)  # four samples at twelve steps
    assert min(len(np.unique(samples)), len(np.unique(growth))) > 10
    assert (growth == 127).mean() > 0.1 or (growth == 128).mean() > 0.1  # what is not known yet is grey

    small = Small((8, 8, 1), 10, (8,))
    write_small(workdir, small, small.init(jax.random.key(0)))
    options = {"sampling.temperature": 0.0, "eval.samples.num_samples": 12, "eval.samples.classifier": workdir}
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    judged = json.loads(finish(start("eval.py", f"--workdir={workdir}", *flags))[-1])
    assert set(judged) == EVERY_METRIC | {"samples"}
    assert judged["samples"]["FID"] > 0 and len(judged["samples"]["fingerprint"]) == 16
    assert judged["samples"]["protocol"]["num_samples"] == 12 and (workdir / "eval" / "nearest.png").exists()
    assert (picture(workdir / "eval" / "samples.png") != samples).any()
    assert ar_jax.load(workdir).config.sampling.temperature == 1.0


def test_a_python_user_reads_the_same_run(trained):
    run = ar_jax.load(trained[0])
    assert run.system.model.order.step[:9].tolist() == [*range(8), 27]  # what the command line asked for: a spiral
    images = run.sample([3, 3, 5], seed=1)
    assert images.shape == (3, 8, 8, 1) and np.isfinite(run.log_prob(images, [3, 3, 5])).all()
    np.testing.assert_array_equal(images, run.sample([3, 3, 5], seed=1))


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(trained, tmp_path):
    workdir = tmp_path / "killed"
    process = start(*TRAIN, f"--workdir={workdir}")
    while not list(workdir.glob("checkpoints/8")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    said = finish(start(*TRAIN, f"--workdir={workdir}"))
    if process.returncode == -signal.SIGKILL:  # otherwise it was faster than the signal
        assert any("resumed after step" in line for line in said) or not said[:-1], said
    jax.tree.map(np.testing.assert_array_equal, ar_jax.load(workdir).params, ar_jax.load(trained[0]).params)
    assert lines(workdir) == lines(trained[0])


def interrupted_after_8_steps(workdir: Path, *options: str) -> list[str]:
    """The command whose first checkpoint is there, and whose process is not."""
    command = [*TRAIN, *options, f"--workdir={workdir}"]
    process = start(*command)
    while not list(workdir.glob("checkpoints/8")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    return command


def full_disk() -> None:
    """In a process to be: no file may grow beyond 20 kB, which a checkpoint's do and metrics do not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_a_sentence_and_leaves_what_was_saved(trained, tmp_path):
    command = interrupted_after_8_steps(tmp_path / "full")
    saved = {path.name for path in (tmp_path / "full" / "checkpoints").iterdir() if path.name.isdigit()}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, preexec_fn=full_disk, capture_output=True, text=True
    )
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("error: A checkpoint in ")
    assert "Those before it are whole" in ended.stderr.splitlines()[-1]
    assert saved <= {path.name for path in (tmp_path / "full" / "checkpoints").iterdir()}
    finish(start(*command))
    assert lines(tmp_path / "full") == lines(trained[0])


@pytest.mark.slow
def test_a_data_process_that_dies_ends_the_run_with_a_sentence(tmp_path):
    process = start(*TRAIN, "--config.data.num_workers=1", "--config.train.num_steps=4000", f"--workdir={tmp_path}")
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    children = " ".join(file.read_text() for file in Path(f"/proc/{process.pid}/task").glob("*/children")).split()
    (worker,) = (child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "error: A process that prepares the data of step" in errors
