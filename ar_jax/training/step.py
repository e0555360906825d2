"""One training step as one compiled program: gradients, update, average, and no update where something overflowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from ar_jax.training.mesh import one_order
from ar_jax.training.paths import named_leaves, with_leaves, without
from ar_jax.training.protocol import Batch, Metrics, Params, Task
from ar_jax.training.schedules import Schedule
from ar_jax.training.state import TrainState, step_key, to_float32

# The fastest reductions add in no fixed order; a run must be repeatable to the bit.
DETERMINISTIC = {"xla_gpu_deterministic_ops": True}

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    seed: int,
    num_steps: int,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """The function of one step, (state, batch [B, ...]) -> (state, metrics), not yet compiled.

    Frozen leaves get no gradient; those that the task replaces are replaced after the optimiser's update of the others.
    Where the loss or the gradient's norm is not finite, all parameters, optimiser and average stay as they were, to
    the bit; the step is counted as skipped, and the schedule waits with the optimiser.

    Args:
      task: what is trained.
      optimizer: turns gradients into updates, its learning rate included.
      schedule: the learning rate by number of updates, for the metrics.
      seed: fixes every step's key.
      num_steps: steps of the whole run.
      accumulate_steps: micro-batches that a batch is cut into; their gradients are averaged.
      ema_decay: decay of the parameters' average at the end of its own warm-up; 0 for no average.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        progress = state.step.astype(jnp.float32) / num_steps
        key = step_key(seed, state.step)
        loss, gradients, metrics, replaced = _loss_and_gradients(
            task, state.params, batch, key, progress, accumulate_steps
        )
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        num_updates = state.step - state.skipped_total
        trained = without(state.params, task.frozen)
        updates, opt_state = optimizer.update(gradients, state.opt_state, to_float32(trained))
        trained = optax.apply_updates(trained, updates)
        params = with_leaves(state.params, named_leaves(trained) | replaced)
        ema = None if state.ema is None else _average(state.ema, trained, num_updates, ema_decay)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            skipped=jnp.where(finite, 0, state.skipped + 1),
            skipped_total=state.skipped_total + jnp.where(finite, 0, 1),
        )
        own = {"loss": loss, "grad_norm": grad_norm, "learning_rate": jnp.asarray(schedule(num_updates), jnp.float32)}
        return new_state, metrics | own | {"skipped": new_state.skipped, "skipped_total": new_state.skipped_total}

    return train_step


def compile_step(
    train_step: TrainStep,
    state: TrainState,
    batch: Batch,
    state_sharding: Any,
    batch_sharding: NamedSharding,
    scalar_sharding: NamedSharding,
    compiler_options: Mapping[str, Any] | None = None,
) -> Any:
    """Compiles a step for these shapes, once and for all: another shape raises instead of compiling again.

    Args:
      train_step: from `make_train_step`.
      state: the state or its shapes. Its buffers are given away (donated) at each call.
      batch: a batch or its shapes.
      state_sharding: sharding of every leaf of the state, going in and coming out.
      batch_sharding: of the batch's arrays.
      scalar_sharding: of the metrics.
      compiler_options: further ones of XLA, by name.

    Returns: the compiled step, a `jax.stages.Compiled`.
    """
    inputs, outputs = (state_sharding, batch_sharding), (state_sharding, scalar_sharding)
    jitted = jax.jit(train_step, donate_argnums=0, in_shardings=inputs, out_shardings=outputs)
    assert isinstance(batch_sharding.mesh, Mesh)
    on_gpus = batch_sharding.mesh.devices.flat[0].platform == "gpu"
    with jax.set_mesh(batch_sharding.mesh):  # kernels cut their arrays over its devices themselves
        lowered = jitted.lower(state, batch)
    options = one_order(batch_sharding.mesh) | (DETERMINISTIC if on_gpus else {}) | dict(compiler_options or {})
    return lowered.compile(options or None)


def _loss_and_gradients(
    task: Task, params: Params, batch: Batch, key: jax.Array, progress: jax.Array, accumulate_steps: int
) -> tuple[jax.Array, Any, Metrics, dict[str, jax.Array]]:
    """Loss, float32 gradients of what is not frozen and metrics of a batch, as means over its micro-batches.

    Also returns the replaced leaves, measured ones among them, whose derivatives are their changes: micro-batches come
    one after another, so what one leaves the next one sees.
    """

    def part(rows: Batch, part_key: jax.Array, held: dict[str, jax.Array]) -> Any:
        def loss_of(trained: Params, measured: dict[str, jax.Array]) -> Any:
            leaves = named_leaves(trained) | held | measured
            loss, metrics, replaced = task.loss(with_leaves(params, leaves), rows, part_key, progress)
            return loss, (dict(metrics), _checked(task, params, replaced))

        known = named_leaves(params) | held
        measured = {name: known[name] for name in known if task.measured(name)}
        gradient_of = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (loss, (metrics, replaced)), (gradients, changes) = gradient_of(without(params, task.frozen), measured)
        replaced |= {name: leaf + changes[name] for name, leaf in measured.items()}
        return to_float32((loss, gradients, metrics)), held | replaced

    if accumulate_steps == 1:
        means, replaced = part(batch, key, {})
        return *means, replaced

    # Micro-batch i takes rows i, i + n, ...: each device cuts up its own rows, none travel.
    pieces = jax.tree.map(lambda x: x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, accumulate_steps)
    shapes, replaced = jax.eval_shape(part, jax.tree.map(lambda x: x[0], pieces), keys[0], {})
    held = {name: leaf for name, leaf in named_leaves(params).items() if name in replaced}

    def add(carry: Any, inputs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        total, held = carry
        own, held = part(*inputs, held)
        return (jax.tree.map(jnp.add, total, own), held), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (total, replaced), _ = jax.lax.scan(add, (zeros, held), (pieces, keys))
    return *jax.tree.map(lambda x: x / accumulate_steps, total), replaced


def _checked(task: Task, params: Params, replaced: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The replaced leaves in their old dtypes, cut off from gradients; ValueError where they do not fit the parameters."""
    old = named_leaves(params)
    for name, value in replaced.items():
        if name not in old or not task.frozen(name) or value.shape != old[name].shape:
            raise ValueError(f"The loss replaces {name!r} with shape {value.shape}, but there is no such frozen leaf.")
    cut = {name: jax.lax.stop_gradient(value) for name, value in replaced.items()}
    return {name: jax.lax.convert_element_type(value, old[name].dtype) for name, value in cut.items()}


def _average(ema: Any, params: Any, num_updates: jax.Array, decay: float) -> Any:
    """The average after one more update. Its decay warms up as (1 + t) / (10 + t): the first parameters fade soon."""
    t = num_updates.astype(jnp.float32)
    warm = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(lambda a, p: warm * a + (1 - warm) * p.astype(a.dtype), ema, params)
