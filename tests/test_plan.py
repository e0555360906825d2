"""A pod is planned on a machine that has none: shardings, memory, collectives, bounds; and what cannot be is said."""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ar_jax import plan
from ar_jax.config import UsageError, get_config
from ar_jax.run import load_facts
from ar_jax.training import topologies

ROOT = Path(__file__).parents[1]
CUDA = Path(os.environ.get("AR_JAX_CUDA", ROOT / ".cache" / "cuda"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false", "AR_JAX_CUDA": str(CUDA)}
    command = [sys.executable, "-m", "ar_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_every_parameter_is_told_with_its_sharding_and_its_bytes_on_a_device() -> None:
    config = get_config(ROOT / "configs/digits.py:base")
    config.mesh = dict(fsdp=2, tensor=2)
    rows = {name: (shape, spec, size) for name, shape, spec, size in plan.parameters(config, load_facts(config))}
    shape, spec, size = rows["generator/decoder/stack/layers/block_0/mlp/up/kernel"]
    assert spec == "None, fsdp, tensor" and size == 4 * shape[0] * shape[1] * shape[2] // 4
    shape, spec, size = rows["generator/decoder/norm/scale"]
    assert (spec, size) == ("whole", 4 * shape[0])


@functools.cache
def five_commands() -> list[list[str]]:
    """Those of docs/pods.md, as words."""
    block = (ROOT / "docs/pods.md").read_text().partition("```sh\n")[2].partition("```")[0]
    return [shlex.split(line) for line in block.splitlines()]


def test_a_training_step_is_compiled_for_a_pod_that_is_not_here() -> None:
    """The fourth of the five commands, with --json."""
    if not Path(os.environ.get("AR_JAX_LIBTPU", "")).is_file():
        pytest.skip("needs the TPU's compiler: make test installs it")
    python, _, module, *arguments = five_commands()[3]
    assert (python, module) == ("python", "ar_jax.plan")
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = json.loads(done.stdout.splitlines()[-1])
    assert told["mesh"] == {"fsdp": 2, "tensor": 2} and told["batch_size"] == 8 and told["fits"]
    assert told["memory"]["total"] == sum(size for kind, size in told["memory"].items() if kind != "total")
    assert {row["axes"] for row in told["collectives"]} >= {"fsdp", "tensor"}
    assert 0 < told["mfu_bound"] <= 1 and told["compiler_seconds"] > 0


def test_a_training_step_is_compiled_for_gpus_that_are_not_here() -> None:
    """With the kernels for GPUs; data goes between two nodes, all else within them."""
    if not (CUDA / "nvidia" / "cuda_nvcc").is_dir():
        pytest.skip("needs the compiler for NVIDIA's GPUs (1.2 GB); docs/pods.md tells how to install it")
    done = run(
        f"--config={ROOT}/configs/llamagen.py:smoke",
        *("--topology=h100:16", "--mesh=data=2,fsdp=2,tensor=4", "--batch=8", "--json"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = json.loads(done.stdout.splitlines()[-1])
    assert told["mesh"] == {"data": 2, "fsdp": 2, "tensor": 4} and told["fits"]
    assert told["memory"]["total"] == sum(size for kind, size in told["memory"].items() if kind != "total")
    across = {row["axes"] for row in told["collectives"] if row["across"]}
    assert "data" in across and not across & {"fsdp", "tensor", "?"}
    assert {row["axes"] for row in told["collectives"]} >= {"data", "fsdp", "tensor"}
    layers = get_config(ROOT / "configs/llamagen.py:smoke").model.num_layers
    assert told["kernels"]["step_attention_dq"] == layers
    assert 0 < told["mfu_bound"] <= 1 and told["compiler_seconds"] > 0


def test_without_the_compiler_for_gpus_a_plan_tells_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setattr(topologies.sys, "path", [str(ROOT)])
    with pytest.raises(UsageError, match=rf"pip install .* jax-cuda12-plugin=={jax.__version__} .*AR_JAX_CUDA=DIR"):
        topologies.topology_devices("h100:8")


@pytest.mark.parametrize("compiler_seconds", [None, 0.2])
def test_a_bound_is_the_longest_of_what_is_known_and_the_report_says_what_is_not(compiler_seconds) -> None:
    known = dict(mesh={"fsdp": 8}, batch_size=8, remat="none", memory={"total": 1}, fits=True, model_flops=10)
    known |= dict(compute_seconds=0.1, collective_seconds=0.05, collectives=[], kernels={"scan": 3}, warnings=[])
    found = plan.Plan(compiler_seconds=compiler_seconds, **known)
    assert (found.bound_seconds, found.mfu_bound) == ((0.1, 1.0) if compiler_seconds is None else (0.2, 0.5))
    said = plan.report(found, topologies.CHIPS["h100"])
    assert (
        f"read and write memory: {'none' if compiler_seconds is None else '0.2 s'}" in said and "scan: 3 times" in said
    )


@pytest.mark.slow
def test_the_first_run_of_the_five_commands_trains_and_is_evaluated(tmp_path: Path) -> None:
    install, train, evaluate, _, pod = five_commands()
    assert install[:2] == ["pip", "install"] and (ROOT / install[3]).is_file() and "tpu" in install[4]
    for command in (train, evaluate):
        words = [word.replace("runs/first", str(tmp_path)) for word in command[1:]]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    config = get_config(ROOT / pod[2].removeprefix("--config="))
    assert config.train.num_steps > 0 and pod[4] == "--config.mesh.fsdp=-1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=v5q:2x2"], "Did you mean 'v5"),
        (["--topology=h100:12"], "h100:8: at most 8 of one node, or a multiple of 8"),
        (["--topology=h100:2x4"], "should tell how many GPUs"),
        (["--mesh=fsdp:2"], "--mesh=fsdp:2 should be such as"),
        (["--mesh=tensor=1024"], "does not fit"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, said, capsys) -> None:
    with pytest.raises(UsageError, match=said):
        plan.main(["plan", f"--config={ROOT}/configs/digits.py:smoke", *arguments])
