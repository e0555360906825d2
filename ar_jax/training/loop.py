"""The training loop: build, resume, step, note, save. What a system must change comes in as an argument."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ar_jax.config import UsageError
from ar_jax.training import checkpoints
from ar_jax.training.chips import chip_of
from ar_jax.training.logging import Recorder
from ar_jax.training.program import CheckpointOptions, Program, TrainOptions, make_program, options
from ar_jax.training.protocol import Params, Task
from ar_jax.training.state import TrainState
from ar_jax.training.termination import EXIT_CODE, Termination
from ar_jax.training.tracing import Tracing
from ar_jax.training.watchdog import Watchdog
from ar_jax.training.workdir import claim

Evaluate = Callable[[Params, int], Mapping[str, float]]
Sample = Callable[[Params, int], np.ndarray | None]

_MAX_BEHIND = 8  # steps that devices may be behind before the host waits: metrics are read that late


class TrainingStopped(RuntimeError):
    """Training cannot go on; its one sentence says why and what to try."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all steps of a run share."""

    program: Program
    train: TrainOptions
    checkpoint_every_steps: int
    evaluate_every_steps: int
    iterator: checkpoints.DataIterator
    manager: ocp.CheckpointManager
    recorder: Recorder | None  # None in all processes but the first
    termination: Termination
    watchdog: Watchdog
    tracing: Tracing
    evaluate: Evaluate | None
    sample: Sample | None
    # Metrics that devices may still be computing, with their step, when it was asked for, and its evaluation.
    pending: collections.deque[tuple[int, float, Any, dict[str, float]]] = dataclasses.field(
        default_factory=collections.deque
    )


def fit(
    task: Task,
    iterator: checkpoints.DataIterator,
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    evaluate: Evaluate | None = None,
    sample: Sample | None = None,
    describe: Mapping[str, Any] | None = None,
    count: Mapping[str, int] | None = None,
    prepare: Callable[[Path], None] | None = None,
    adopt: Callable[[Params], Params] | None = None,
) -> TrainState:
    """Trains a task to the end of its run, from wherever the run in `workdir` stands.

    A run that was killed at any moment ends, after the same call, with the same parameters to the bit as one that was
    not.

    Args:
      task: what is trained.
      iterator: batches, dicts of the rows that `own_rows` names, [rows, ...]; checkpoints keep its position.
      config: the whole config; used here are seed, optimizer, schedule, train, checkpoint, mesh and eval.every_steps
        (0: only at the end).
      workdir: directory of the run, made if it is missing.
      mesh: devices to use instead of those of `config.mesh`.
      evaluate: metrics by name of (averaged) parameters after a step.
      sample: a picture [H, W, 3] uint8 of samples, or None, likewise.
      describe: further lines for what is said at the start, by name.
      count: what there is in an example, by name, such as {"tokens": 256}: metrics tell how many of them a second.
      prepare: is called with the directory as soon as it is this run's own, before anything is read or compiled.
      adopt: the parameters of a fresh run pass through it before the first step: what was trained before is put in here.

    Returns: the state after the last step.

    Raises:
      UsageError: config, data or directory are not as they should be; nothing has been overwritten.
      TrainingStopped: `config.train.max_skipped_steps` steps in a row were not finite, or a checkpoint could not be written.
      SystemExit: code 143, after SIGTERM; a checkpoint has been saved.
    """
    program = make_program(task, config, mesh)
    saving = options(CheckpointOptions, config, "checkpoint")
    evaluate_every = int((config.get("eval") or {}).get("every_steps", 0)) or program.train.num_steps
    if saving.keep_best and saving.every_steps % evaluate_every:
        raise UsageError(
            f"config.checkpoint.keep_best={saving.keep_best} compares checkpoints by their evaluation; set "
            f"config.eval.every_steps to {saving.every_steps}, as config.checkpoint.every_steps, or a divisor of it."
        )
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(claim(workdir, config))
        if prepare is not None and jax.process_index() == 0:
            prepare(directory)
        termination = stack.enter_context(Termination())
        manager = stack.enter_context(contextlib.closing(checkpoints.open_manager(directory / "checkpoints", saving)))
        state = _resume(program, manager, iterator, adopt)
        start, num_steps = int(state.step), program.train.num_steps
        if start >= num_steps:
            return state
        batch = _next_batch(program, iterator, start + 1)
        compiled = program.compile(batch)
        recorder = None
        if jax.process_index() == 0:
            _announce(program, compiled, state, describe or {})
            recorder = Recorder(directory, start, num_steps, *_work(program, batch, count or {}))
            stack.callback(recorder.close)
        tracing = Tracing(directory / "profile", program.train.profile_steps)
        stack.callback(tracing.close)
        run = _Run(
            program=program,
            train=program.train,
            checkpoint_every_steps=saving.every_steps,
            evaluate_every_steps=evaluate_every,
            iterator=iterator,
            manager=manager,
            recorder=recorder,
            termination=termination,
            watchdog=stack.enter_context(Watchdog(program.train.stuck_seconds)),
            tracing=tracing,
            evaluate=evaluate,
            sample=sample,
        )
        return _train(run, compiled, state, _batches(run, batch, start))


def load(
    task: Task, config: Any, workdir: str | os.PathLike[str], *, step: int | str = "newest", mesh: Mesh | None = None
) -> TrainState:
    """The state of the newest undamaged checkpoint of a run, or of another, for evaluation; the directory is only read.

    Args:
      task: what was trained.
      config: the run's config, as `workdir.read_config` gives it.
      workdir: directory of the run.
      step: of the checkpoint; "newest", or "best" by `config.checkpoint`.
      mesh: devices to use instead of those of `config.mesh`.

    Raises:
      UsageError: there is no such checkpoint, it is of another model, or all are damaged.
    """
    directory = Path(workdir).absolute() / "checkpoints"
    state = None
    if directory.is_dir():
        program = make_program(task, config, mesh)
        saved = options(CheckpointOptions, config, "checkpoint")
        if step == "best" and not saved.keep_best:
            raise UsageError(
                f"The run in {workdir} keeps no best checkpoint; train with config.checkpoint.keep_best and best_metric."
            )
        with contextlib.closing(checkpoints.open_manager(directory, saved, read_only=True)) as manager:
            if step == "newest":
                state = checkpoints.restore_latest(manager, program.shapes)
            else:
                state = checkpoints.restore(manager, program.shapes, None if step == "best" else int(step))
    if state is None:
        raise UsageError(
            f"There is no checkpoint in {directory}; train first: python train.py --config=... --workdir={workdir}."
        )
    return state


def _resume(
    program: Program,
    manager: ocp.CheckpointManager,
    iterator: checkpoints.DataIterator,
    adopt: Callable[[Params], Params] | None,
) -> TrainState:
    """The newest checkpoint's state, with the data at its place, or a fresh state."""
    state = checkpoints.restore_latest(manager, program.shapes, iterator)
    if state is None:
        state = program.init()
        return state if adopt is None else program.started(state, adopt(state.params))
    checkpoints.remove_after(manager, int(state.step))
    return state


def _train(run: _Run, compiled: Any, state: TrainState, batches: Iterator[Any]) -> TrainState:
    """All steps that are left, each as one call of the compiled program, with what is due after it."""
    num_steps, first = run.train.num_steps, int(state.step) + 1
    for step, batch in zip(range(first, num_steps + 1), batches, strict=True):
        run.watchdog.moved()
        run.tracing.before(step - first, state)
        with jax.transfer_guard("disallow"):
            state, metrics = compiled(state, batch)
        last = step == num_steps
        evaluates = last or step % run.evaluate_every_steps == 0
        asked = time.monotonic()
        with run.watchdog.paused():
            evaluation = _evaluate(run, state, step) if evaluates else {}
        run.pending.append((step, asked, metrics, {f"eval/{name}": value for name, value in evaluation.items()}))
        stops = run.termination.requested_at(
            step
        )  # asked once: what comes in while metrics are read is for the next step
        saves = last or stops or step % run.checkpoint_every_steps == 0
        # Before saving: what is not noted by then, a resumed run would not note.
        _drain(run, leave=0 if saves else _MAX_BEHIND)
        if saves:
            with _writing(run):
                checkpoints.save(run.manager, state, run.iterator, evaluation)
        if stops and not last:
            with _writing(run):
                run.manager.wait_until_finished()
            print(f"SIGTERM: saved step {step} of {num_steps}; the same command goes on from there.", file=sys.stderr)
            raise SystemExit(EXIT_CODE)
    with _writing(run):
        run.manager.wait_until_finished()
    return state


@contextlib.contextmanager
def _writing(run: _Run) -> Iterator[None]:
    """For what writes checkpoints, or waits until one is written: no watchdog, and failures in one sentence."""
    with run.watchdog.paused():
        try:
            yield
        except (UsageError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # a disk that is full shows as almost any exception of the file writers
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][-200:]
            raise TrainingStopped(
                f"A checkpoint in {run.manager.directory} could not be written ({reason}). Those before it are whole: make "
                "room, or mend the file system; the same command goes on from the last one."
            ) from error


def _batches(run: _Run, first: Any, start: int) -> Iterator[Any]:
    """Batches on the devices. None is read before it is asked for: the iterator's position is that of the step."""
    yield first
    for step in range(start + 2, run.train.num_steps + 1):
        yield _next_batch(run.program, run.iterator, step)


def _next_batch(program: Program, iterator: checkpoints.DataIterator, step: int) -> Any:
    try:
        return program.put(next(iterator))
    except StopIteration as error:
        raise UsageError(
            f"The data ended before step {step} of {program.train.num_steps}; make it repeat, or lower "
            "config.train.num_steps."
        ) from error
    except RuntimeError as error:
        if "Worker process" not in str(error):
            raise
        raise TrainingStopped(
            f"A process that prepares the data of step {step} has ended ({str(error).splitlines()[0]}) What it said is above; the "
            "same command goes on from the last checkpoint."
        ) from error


def _evaluate(run: _Run, state: TrainState, step: int) -> dict[str, float]:
    """Metrics of the averaged parameters, and a picture for TensorBoard. SIGTERM breaks it off."""
    metrics: dict[str, float] = {}
    with run.termination.interrupts():
        if run.evaluate is not None and not run.termination.requested:
            metrics = {name: float(value) for name, value in run.evaluate(state.averaged_params, step).items()}
        image = run.sample(state.averaged_params, step) if run.sample and not run.termination.requested else None
        if image is not None and run.recorder is not None:
            run.recorder.image(step, np.asarray(image))
    return metrics


def _drain(run: _Run, leave: int) -> None:
    """Reads the metrics of all steps but the newest `leave`, and notes those that are due."""
    while len(run.pending) > leave:
        step, asked, on_device, evaluation = run.pending.popleft()
        metrics = {name: value.item() for name, value in jax.device_get(on_device).items()}
        run.watchdog.moved()
        skipped = metrics.pop("skipped")
        if run.recorder and (evaluation or step % run.train.log_every_steps == 0 or step == run.train.num_steps):
            run.recorder.metrics(step, metrics | evaluation, asked)
        if skipped >= run.train.max_skipped_steps:
            raise TrainingStopped(
                f"Loss or gradient was not finite in {skipped} steps in a row, up to step {step}; the parameters are "
                f"still those of step {step - skipped}. Try a lower config.optimizer.learning_rate, or allow more with "
                "config.train.max_skipped_steps."
            )


def _work(program: Program, batch: Any, count: Mapping[str, int]) -> tuple[dict[str, float], float | None]:
    """What a step does, by name, and the FLOP/s of all devices, where they are known; see Recorder."""
    work: dict[str, float] = {"examples": program.train.batch_size}
    work |= {name: number * program.train.batch_size for name, number in count.items()}
    devices = program.mesh.devices.flatten()
    chip = chip_of(devices[0].device_kind)
    flops = None if chip is None else program.model_flops(batch)  # takes a moment, so only for what can be compared
    return (work, None) if chip is None or flops is None else (work | {"flops": flops}, chip.flops * devices.size)


def _announce(program: Program, compiled: Any, state: TrainState, describe: Mapping[str, Any]) -> None:
    """Prints what the run will do, before it does it."""
    for name, value in {**program.describe(compiled, state), **describe}.items():
        print(f"{name}: {value}", flush=True)
