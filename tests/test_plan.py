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

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
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
        (["--mesh=fsdp:2"], "--mesh=fsdp:2 should be such as"),
        (["--mesh=tensor=1024"], "does not fit"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, said, capsys) -> None:
    with pytest.raises(UsageError, match=said):
        plan.main(["plan", f"--config={ROOT}/configs/digits.py:smoke", *arguments])
