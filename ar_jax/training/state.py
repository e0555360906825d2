"""All that a run carries from one step to the next, and the keys that need not be carried."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ar_jax.training.paths import named_leaves, with_leaves, without
from ar_jax.training.protocol import Params, Task

_INIT_STEP = 2**32 - 1  # a step that no run reaches: its key is the one that parameters are drawn with


@flax.struct.dataclass
class TrainState:
    """The state after `step` steps. No key is stored: step n always uses `step_key(seed, n)`.

    Attributes:
      step: [] int32, steps taken, skipped ones included.
      params: the parameters, in the model's own dtypes.
      opt_state: the optimiser's state of the parameters that are not frozen, float32.
      ema: float32 moving average of those parameters, or None where it is switched off.
      skipped: [] int32, steps skipped in a row just now because loss or gradient was not finite.
      skipped_total: [] int32, all steps skipped so far.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    skipped: jax.Array
    skipped_total: jax.Array

    @property
    def averaged_params(self) -> Params:
        """The parameters to evaluate and sample with: the moving average where there is one, frozen ones as they are."""
        return self.params if self.ema is None else with_leaves(self.params, named_leaves(self.ema))


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of one step: a function of the seed and the step only, so that a resumed run draws the same numbers."""
    return jax.random.fold_in(jax.random.key(seed), jnp.uint32(step))


def to_float32(tree: Any) -> Any:
    """The floating-point leaves in float32: gradients, moments and averages are kept so whatever the parameters are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def create_state(task: Task, optimizer: optax.GradientTransformation, seed: int, use_ema: bool) -> TrainState:
    """The state before the first step. Traceable.

    Args:
      task: draws the parameters, and says which are frozen.
      optimizer: makes its own state for the others.
      seed: fixes the draw.
      use_ema: whether a moving average is kept; it starts at the parameters.
    """
    params = task.init(step_key(seed, _INIT_STEP))
    trained = without(params, task.frozen)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(to_float32(trained)),
        ema=to_float32(trained) if use_ema else None,
        skipped=zero,
        skipped_total=zero,
    )
