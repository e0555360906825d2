import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from toy_training import Toy, batches, make_config

from ar_jax.config import UsageError
from ar_jax.training import fit, load
from ar_jax.training import loop as loop_module
from ar_jax.training.chips import CHIPS
from ar_jax.training.loop import TrainingStopped
from ar_jax.training.program import Program, make_program

SCRIPT = Path(__file__).with_name("toy_training.py")


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Interrupted(Exception):
    pass


def interrupted(count):
    """The toy's data, with the power cut after some batches."""
    inner = batches()

    class Data:
        get_state, set_state = inner.get_state, inner.set_state
        left = count

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise Interrupted
            return next(inner)

    return Data()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run that was never disturbed: its directory, its last state, and what was asked of the callbacks."""
    workdir, calls = tmp_path_factory.mktemp("finished"), []
    config = make_config()
    config.eval.every_steps = 6

    def evaluate(params, step):
        calls.append((step, jax.device_get(params)))
        return {"bits_per_dim": 1.5}

    def sample(params, step):
        return np.zeros((4, 4, 3), np.uint8)

    state = fit(Toy(), batches(), config, workdir, evaluate=evaluate, sample=sample, describe={"tokens per step": 8})
    return workdir, state, calls


def test_a_run_learns_and_notes_every_step_once(finished):
    workdir, state, _ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13)) and state.step == 12
    assert np.mean([line["loss"] for line in lines[-4:]]) < np.mean([line["loss"] for line in lines[:4]])
    assert {"grad_norm", "learning_rate", "skipped_total", "absolute_error", "examples_per_second"} <= set(lines[0])
    np.testing.assert_allclose([line["progress"] for line in lines], np.arange(12) / 12, rtol=1e-6)


def test_evaluation_gets_the_averaged_parameters_when_it_is_due(finished):
    workdir, state, calls = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert (
        [step for step, _ in calls]
        == [6, 12]
        == [line["step"] for line in lines if line.get("eval/bits_per_dim") == 1.5]
    )
    chex.assert_trees_all_equal(calls[-1][1], jax.device_get(state.ema | {"seen": state.params["seen"]}))


def test_a_finished_run_is_only_read_again(finished, monkeypatch):
    workdir, state, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(Program, "compile", None)
    chex.assert_trees_all_equal(fit(Toy(), batches(), make_config(), workdir), state)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_load_gives_the_last_state_and_says_where_there_is_none(finished, tmp_path):
    workdir, state, _ = finished
    chex.assert_trees_all_equal(load(Toy(), make_config(), workdir), state)
    with pytest.raises(UsageError, match="There is no checkpoint in .*; train first"):
        load(Toy(), make_config(), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="params/head/kernel is .* there"):
        load(Toy(width=9), make_config(), workdir)


def test_a_profile_names_the_longest_operations_and_metrics_tell_the_utilisation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop_module, "chip_of", lambda kind: CHIPS["v5e"])
    fit(Toy(), batches(), make_config(num_steps=6, profile_steps=2), tmp_path, count={"tokens": 3})
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    said = capsys.readouterr().out.partition("profile: ")[2].splitlines()
    shares = [float(line.split("%")[0]) for line in said[1:6] if "ms a step" in line]
    assert 2 <= len(shares) <= 5 and shares == sorted(shares, reverse=True)
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert line["tokens_per_second"] == pytest.approx(3 * line["examples_per_second"])
        assert line["mfu"] == pytest.approx(line["flops_per_second"] / (jax.device_count() * 197e12))


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    bits, config = {4: 1.0, 8: 3.0, 12: 2.0}, make_config()
    config.checkpoint.update(keep=1, keep_best=1, best_metric="bits_per_dim")
    config.eval.every_steps = 5
    with pytest.raises(UsageError, match="set config.eval.every_steps to 4"):
        fit(Toy(), batches(), config, tmp_path)
    config.eval.every_steps = 4
    fit(Toy(), batches(), config, tmp_path, evaluate=lambda params, step: {"bits_per_dim": bits[step]})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "4"]
    assert load(Toy(), config, tmp_path, step="best").step == 4 and load(Toy(), config, tmp_path).step == 12
    with pytest.raises(UsageError, match="keeps no best checkpoint"):
        load(Toy(), make_config(), tmp_path, step="best")


@pytest.mark.parametrize("damage", [False, True], ids=["newest is whole", "newest is damaged"])
def test_a_resumed_run_ends_with_the_same_bits_and_one_line_a_step(finished, tmp_path, damage, caplog, capsys):
    with pytest.raises(Interrupted):
        fit(Toy(), interrupted(10), make_config(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]
    if damage:
        for file in (tmp_path / "checkpoints" / "8" / "state").rglob("d/*"):  # one of them is read, none says which
            file.write_bytes(file.read_bytes()[:50])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    capsys.readouterr()
    with caplog.at_level(logging.WARNING, "ar_jax"):
        state = fit(Toy(), batches(), make_config(), tmp_path)
    chex.assert_trees_all_equal(state, finished[1])
    assert steps(tmp_path) == list(range(1, 13))
    assert f"resumed after step {4 if damage else 8}" in capsys.readouterr().out
    assert [r.levelname for r in caplog.records if r.name.startswith("ar_jax")] == ["WARNING"] * damage
    chex.assert_trees_all_equal(load(Toy(), make_config(), tmp_path), state)


def test_the_start_says_what_will_be_done(tmp_path, capsys):
    with pytest.raises(Interrupted):
        fit(Toy(), interrupted(1), make_config(), tmp_path, describe={"tokens per step": 512})
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert (
        said["parameters"] == "46, 5 of them frozen"
        and said["tokens per step"] == "512"
        and said["steps"] == "12 of 8 examples"
    )
    assert said["mesh"] == f"data={jax.device_count()}" and said["devices"] == f"{jax.device_count()} x cpu"
    assert "MiB per device (arguments" in said["memory"]


def test_too_many_bad_steps_in_a_row_stop_the_run_with_the_parameters_as_they_were(tmp_path):
    config = make_config(max_skipped_steps=3, ema_decay=0.0)
    with pytest.raises(
        TrainingStopped, match="not finite in 3 steps in a row, up to step 3; the parameters are still those of step 0"
    ):
        fit(Toy(), batches(bad=tuple(range(64))), config, tmp_path)


def test_the_step_moves_nothing_between_host_and_devices_unasked(tmp_path, monkeypatch):
    """Were the guard missing, numpy arrays would be copied silently at each step."""
    monkeypatch.setattr(Program, "put", lambda self, batch: batch)
    monkeypatch.setattr(
        Program, "compile", lambda self, batch: jax.jit(lambda state, batch: (state, {"loss": batch["y"]}))
    )
    monkeypatch.setattr(loop_module, "_announce", lambda *arguments: None)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        fit(Toy(), batches(), make_config(), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.num_steps": 0}, "config.train.num_steps=0"),
        ({"train.batch_size": 8.5}, "config.train.batch_size=8.5"),
        ({"train.ema_decay": 1.0}, "config.train.ema_decay=1.0"),
        ({"train.accumulate_steps": 3}, r"accumulate_steps=3 x \d+ devices; use a multiple of"),
        ({"train.bach_size": 8}, "Did you mean 'batch_size'"),
        ({"train.batch_size": 16}, "asks for 16 rows per process"),
        ({"checkpoint.keep": 0}, "config.checkpoint.keep=0"),
        ({"checkpoint.every": 5}, "Did you mean 'every_steps'"),
        ({"optimizer.kind": "adam"}, "Did you mean 'adamw'"),
        ({"optimizer.learning_rate": -1.0}, "config.optimizer.learning_rate=-1.0"),
        ({"optimizer.learning_rate": "fast"}, "config.optimizer.learning_rate='fast'"),
        ({"schedule.kind": "cosin"}, "Did you mean 'cosine'"),
        ({"schedule.warmup_steps": 13}, "config.schedule.warmup_steps=13"),
        ({"schedule.warmup": 3}, "Did you mean 'warmup_steps'"),
        ({"mesh.fsd": 2}, "Did you mean 'fsdp'"),
        ({"mesh.data": 0}, "config.mesh"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_compiled(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(loop_module, "_announce", None)
    config = make_config().to_dict()
    for key, value in change.items():
        section, name = key.split(".")
        config[section][name] = value
    config = type(make_config())(config)
    monkeypatch.setattr(Program, "compile", None)
    with pytest.raises(UsageError, match=words):
        fit(Toy(), batches(), config, tmp_path)
    assert "metrics.jsonl" not in os.listdir(tmp_path)


def test_data_that_end_are_told(tmp_path):
    class Short:
        left = 1

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return next(batches())

    with pytest.raises(UsageError, match="The data ended before step 2 of 12; make it repeat"):
        fit(Toy(), Short(), make_config(), tmp_path)


def test_shapes_are_known_without_computing_anything():
    program = make_program(Toy(), make_config())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(program.shapes))


def test_sigterm_while_metrics_are_read_saves_before_it_stops(tmp_path, monkeypatch):
    """Once the request was looked at twice: before the metrics were read, to save, and after that, to leave."""
    drain = loop_module._drain

    def interrupted_drain(run, leave):
        drain(run, leave)
        if run.pending and run.pending[-1][0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop_module, "_drain", interrupted_drain)
    with pytest.raises(SystemExit) as stopped:
        fit(Toy(), batches(), make_config(), tmp_path)
    assert stopped.value.code == 143 and load(Toy(), make_config(), tmp_path).step == 3


# Real processes, killed for real.


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device and a compilation cache, so that a process is quick to start."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    root = str(Path(__file__).parents[2])
    return cache | os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": root}


def start(workdir, environment, *options):
    command = [sys.executable, str(SCRIPT), str(workdir), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process):
    """Returns when the first step has been noted, or when the process has ended."""
    while (line := process.stdout.readline()) and not line.startswith("step "):
        pass


def result(workdir):
    config = make_config(num_steps=60)
    config.mesh.data = 1
    return jax.device_get(load(Toy(), config, workdir))


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_that_was_not(tmp_path, environment):
    whole = start(tmp_path / "whole", environment, "--seconds=0")
    error = whole.communicate(timeout=120)[1]
    assert whole.returncode == 0, error
    codes = []
    for _ in range(3):
        process = start(tmp_path / "killed", environment, "--seconds=0.05")
        wait_for_step(process)
        time.sleep(random.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1]
        codes.append(process.returncode)
        assert process.returncode in (0, -signal.SIGKILL), error
    assert -signal.SIGKILL in codes
    last = start(tmp_path / "killed", environment, "--seconds=0")
    out, error = last.communicate(timeout=120)
    assert last.returncode == 0, error
    chex.assert_trees_all_equal(result(tmp_path / "killed"), result(tmp_path / "whole"))
    assert steps(tmp_path / "killed") == list(range(1, 61))


def test_sigterm_saves_at_once_and_a_second_process_is_refused_meanwhile(tmp_path, environment):
    process = start(
        tmp_path, environment, "--seconds=10"
    )  # half a minute or more: far longer than the second one's start
    wait_for_step(process)
    second = start(tmp_path, environment)
    error = second.communicate(timeout=120)[1]
    assert second.returncode == 2 and error.startswith(f"{tmp_path} is in use by another process; wait")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert process.returncode == 143 and f"SIGTERM: saved step {saved} of 60" in error
    assert steps(tmp_path) == list(range(1, saved + 1))
    resumed = start(tmp_path, environment, "--seconds=0")
    out, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and f"resumed after step {saved}" in out, error
