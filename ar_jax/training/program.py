"""A task and its config made into what devices run: mesh, shapes and shardings of the state, and the compiled step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError, build
from ar_jax.training.mesh import make_mesh
from ar_jax.training.optimizers import make_optimizer
from ar_jax.training.paths import named_leaves, without
from ar_jax.training.protocol import Batch, Task
from ar_jax.training.schedules import Schedule
from ar_jax.training.sharding import (
    Rule,
    batch_sharding,
    checked_rules,
    num_batch_shards,
    put_batch,
    replicated,
    tree_shardings,
)
from ar_jax.training.sharding import own_rows as sharding_rows
from ar_jax.training.state import TrainState, create_state, to_float32
from ar_jax.training.step import compile_step, make_train_step
from ar_jax.training.tables import OPTIMIZERS, SCHEDULES

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """`config.train`.

    Attributes:
      num_steps: steps of the whole run.
      batch_size: examples of a step, over all devices and micro-batches.
      log_every_steps: steps from one line of metrics to the next.
      accumulate_steps: micro-batches that a batch is cut into to save memory.
      ema_decay: decay of the parameters' moving average; 0 for no average.
      max_skipped_steps: the run stops after so many steps in a row whose loss or gradient is not finite.
      init_from: directory of a run of the same model whose parameters a fresh run starts with; "" draws fresh ones.
      stuck_seconds: the run ends when no step has ended for so long, evaluation and saving left out; see `Watchdog`.
      profile_steps: so many steps are traced, from the third of this process on, into the run's directory; 0 for none.
    """

    num_steps: int
    batch_size: int
    log_every_steps: int = 20
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    max_skipped_steps: int = 10
    init_from: str = ""
    stuck_seconds: int = 1800
    profile_steps: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that make no run."""
        names = ("num_steps", "batch_size", "log_every_steps", "accumulate_steps", "max_skipped_steps")
        check_at_least("train", self, (*names, "stuck_seconds"), 1)
        check_at_least("train", self, ("profile_steps",), 0)
        if not 0 <= self.ema_decay < 1:
            raise UsageError(
                f"config.train.ema_decay={self.ema_decay} must be at least 0 (no average) and below 1, such as 0.999."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """`config.checkpoint`.

    Attributes:
      every_steps: steps from one checkpoint to the next; the last step is always saved.
      keep: newest checkpoints that are kept. With 1 there is none to fall back on when it is damaged.
      keep_every_steps: those of multiples of so many steps are kept, too; 0 for none.
      keep_best: so many of the best are kept, too, among those that were evaluated in their step; 0 for none.
      best_metric: of the evaluation, by which they are compared, such as "bits_per_dim".
      best_is: "lowest" or "highest".
    """

    every_steps: int = 1000
    keep: int = 3
    keep_every_steps: int = 0
    keep_best: int = 0
    best_metric: str = ""
    best_is: str = "lowest"

    def __post_init__(self) -> None:
        """Refuses numbers out of range, and a best of nothing."""
        check_at_least("checkpoint", self, ("every_steps", "keep"), 1)
        check_at_least("checkpoint", self, ("keep_every_steps", "keep_best"), 0)
        if self.best_is not in ("lowest", "highest"):
            raise UsageError(f"config.checkpoint.best_is={self.best_is!r} must be 'lowest' or 'highest'.")
        if bool(self.keep_best) != bool(self.best_metric):
            raise UsageError(
                f"config.checkpoint.keep_best={self.keep_best} and best_metric={self.best_metric!r} go together: how many, "
                "and by which metric of the evaluation."
            )

    def quality(self, metrics: Mapping[str, float]) -> float:
        """How good a checkpoint of such an evaluation is; more is better.

        Raises:
          UsageError: the evaluation has no such metric.
        """
        if self.best_metric not in metrics:
            raise UsageError(
                f"config.checkpoint.best_metric={self.best_metric!r} is no metric of the evaluation; "
                f"it gives {', '.join(metrics)}."
            )
        return metrics[self.best_metric] * (1 if self.best_is == "highest" else -1)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the loop needs of task and config.

    Attributes:
      task: what is trained.
      train: options of the loop.
      seed: fixes every key.
      optimizer: with clipping and learning rate.
      schedule: learning rate by number of updates.
      mesh: the devices.
      shapes: shape, dtype and sharding of every leaf of the state.
    """

    task: Task
    train: TrainOptions
    seed: int
    optimizer: optax.GradientTransformation
    schedule: Schedule
    mesh: Mesh
    shapes: TrainState

    def init(self) -> TrainState:
        """The state before the first step, each array made where it belongs."""
        create = lambda: create_state(self.task, self.optimizer, self.seed, self.train.ema_decay > 0)  # noqa: E731
        return jax.jit(create, out_shardings=_shardings(self.shapes))()

    def started(self, state: TrainState, params: Any) -> TrainState:
        """A fresh state with other parameters, which each device gets its part of."""
        params = jax.tree.map(lambda new, like: jax.device_put(new, like.sharding), params, self.shapes.params)
        if state.ema is None:
            return dataclasses.replace(state, params=params)
        ema = to_float32(without(params, self.task.frozen))
        return dataclasses.replace(
            state, params=params, ema=jax.tree.map(jnp.copy, ema)
        )  # a donated buffer can be given only once

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """A batch on the devices, from the rows that this process has of it; see `own_rows`."""
        for name, value in batch.items():
            if np.ndim(value) == 0 or len(value) != self.num_rows:
                raise UsageError(
                    f"The data gives {name!r} with shape {list(np.shape(value))}, but "
                    f"config.train.batch_size={self.train.batch_size} asks for {self.num_rows} "
                    f"rows per process; make the data's batch size the same."
                )
        return put_batch(batch, batch_sharding(self.mesh), self.train.batch_size)

    @functools.cached_property
    def num_rows(self) -> int:
        """How many rows of a batch this process has."""
        return len(sharding_rows(batch_sharding(self.mesh), self.train.batch_size))

    def compile(self, batch: Batch, compiler_options: Mapping[str, Any] | None = None) -> Any:
        """The compiled step for batches of this shape; see `compile_step`."""
        step = make_train_step(
            self.task,
            self.optimizer,
            self.schedule,
            seed=self.seed,
            num_steps=self.train.num_steps,
            accumulate_steps=self.train.accumulate_steps,
            ema_decay=self.train.ema_decay,
        )
        shardings = _shardings(self.shapes), batch_sharding(self.mesh), replicated(self.mesh)
        return compile_step(step, self.shapes, batch, *shardings, compiler_options)

    def model_flops(self, batch: Batch) -> int | None:
        """FLOPs of a step on batches of this shape, as far as the jaxpr tells them.

        Three times those of the loss; of what a task computes `without_gradient`, such as tokens, once.
        """
        key, progress = jax.random.key(0), jnp.zeros(())
        fixed = getattr(self.task, "without_gradient", lambda params, batch, key: ())
        try:
            whole = flops(lambda p, b: self.task.loss(p, b, key, progress)[0], self.shapes.params, batch)
            return 3 * whole - 2 * flops(lambda p, b: fixed(p, b, key), self.shapes.params, batch)
        except NotImplementedError:
            return None

    def describe(self, compiled: Any, state: TrainState) -> dict[str, str]:
        """What a run of the compiled step will do, by name, for people to read."""
        devices = self.mesh.devices.flatten()
        train, first = self.train, int(state.step)
        sizes = {name: leaf.size for name, leaf in named_leaves(self.shapes.params).items()}
        frozen = sum(size for name, size in sizes.items() if self.task.frozen(name))
        resumed = f", resumed after step {first}" if first else ""
        micro = f" in {train.accumulate_steps} micro-batches" if train.accumulate_steps > 1 else ""
        return {
            "parameters": f"{sum(sizes.values()):,}" + (f", {frozen:,} of them frozen" if frozen else ""),
            "steps": f"{train.num_steps:,} of {train.batch_size} examples{micro}{resumed}",
            "devices": f"{devices.size} x {devices[0].device_kind}",
            "mesh": ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items()),
            "memory": _memory(compiled),
        }


def make_program(task: Task, config: Any, mesh: Mesh | None = None) -> Program:
    """Checks the config and works out shapes and shardings; nothing is computed or written.

    Args:
      task: what is trained.
      config: the whole config; used are seed, optimizer, schedule, train and mesh.
      mesh: devices to use instead of those of `config.mesh`.

    Raises:
      UsageError: something in the config is not as it should be.
    """
    train, mesh, rules = _layout(config, mesh)
    schedule = build(SCHEDULES, config.schedule, "schedule", peak=_peak(config.optimizer), num_steps=train.num_steps)
    optimizer = make_optimizer(OPTIMIZERS, config.optimizer, schedule)
    shapes = jax.eval_shape(lambda: create_state(task, optimizer, config.seed, train.ema_decay > 0))
    shardings = tree_shardings(shapes, mesh, rules)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Program(task, train, config.seed, optimizer, schedule, mesh, shapes)


def own_rows(config: Any, mesh: Mesh | None = None) -> np.ndarray:
    """The rows of every batch of training that this process has to read, ascending.

    Where a mesh cuts more than batches, several processes may have to read the same.

    Args:
      config: used are train and mesh.
      mesh: devices to use instead of those of `config.mesh`.

    Raises:
      UsageError: the mesh or the size of a batch is not as it should be.
    """
    train, mesh, _ = _layout(config, mesh)
    return sharding_rows(batch_sharding(mesh), train.batch_size)


def _layout(config: Any, mesh: Mesh | None) -> tuple[TrainOptions, Mesh, tuple[Rule, ...]]:
    train = options(TrainOptions, config, "train")
    axes = dict(config.get("mesh") or {"data": -1})
    rules = checked_rules(axes.pop("rules", ()))
    mesh = mesh or make_mesh(axes or {"data": -1})
    _check_batch_size(train, num_batch_shards(mesh))
    return train, mesh, rules


def options(kind: type[Options], config: Any, section: str) -> Options:
    """A section of the config as its dataclass; UsageError on unknown keys and wrong types."""
    return build({section: kind}, {"kind": section, **(config.get(section) or {})}, section)


def _peak(optimizer: Mapping[str, Any]) -> float:
    """The learning rate of `config.optimizer`: what the schedule peaks at."""
    rate = optimizer.get("learning_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise UsageError(f"config.optimizer.learning_rate={rate!r} must be a number above 0, such as 1e-3.")
    return float(rate)


def _check_batch_size(train: TrainOptions, num_shards: int) -> None:
    """Raises UsageError unless batches can be cut evenly over micro-batches, devices and processes."""
    parts = train.accumulate_steps * num_shards
    if train.batch_size % parts:
        raise UsageError(
            f"config.train.batch_size={train.batch_size} cannot be cut into accumulate_steps="
            f"{train.accumulate_steps} x {num_shards} devices; use a multiple of {parts}, "
            f"such as {-(-train.batch_size // parts) * parts}."
        )


def check_at_least(section: str, values: Any, names: tuple[str, ...], least: int) -> None:
    """Raises UsageError unless these fields of a section are whole numbers of at least so many."""
    for name in names:
        value = getattr(values, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"config.{section}.{name}={value!r} must be a whole number of at least {least}.")


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, shapes)


def _memory(compiled: Any) -> str:
    """Memory of one device during a step, as the compiler has planned it."""
    plan = compiled.memory_analysis()
    if plan is None:
        return "unknown"
    arguments, temporary = plan.argument_size_in_bytes, plan.temp_size_in_bytes
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes  # donated arguments are written in place
    sizes = [f"{size / 2**20:.1f} MiB" for size in (arguments + temporary + outputs, arguments, temporary, outputs)]
    return "{} per device (arguments {}, temporary {}, new outputs {})".format(*sizes)
