"""What the replays of all generators need: a system from a config, with official weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.data.protocol import Facts
from ar_jax.interop.rules import Rules
from ar_jax.interop.transfer import to_ours
from ar_jax.models.generator import Context
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.sampling.loop import drawn_from
from ar_jax.system import System, from_config

Weights = Mapping[str, np.ndarray]
Outputs = dict[str, Any]


def official_run(
    config: Mapping[str, Any], num_classes: int, rules: Callable[[System], Rules], weights: Weights
) -> Any:
    """A system on tokens, and its parameters from official weights.

    Args:
      config: tokenizer, order, model and what else the system has.
      num_classes: of the data.
      rules: of the system.
      weights: by official name.
    """
    facts = Facts("image", tuple(config.get("image_shape", (1, 1, 3))), 256, tuple(map(str, range(num_classes))))
    system = from_config({k: v for k, v in config.items() if k != "image_shape"}, facts)
    like = jax.eval_shape(system.init, jax.random.key(0))
    return system, jax.tree.map(jnp.asarray, to_ours(rules(system), weights, like).params)


def logits_in_order(
    system: System,
    params: Any,
    tokens: np.ndarray | Array,
    condition: Any,
    slots: np.ndarray | None = None,
    drop: bool = False,
) -> tuple[Array, Array]:
    """Teacher-forced logits and the tokens that they predict, in the order of generation, [B, L, V] and [B, L].

    Args:
      system: of a model that remembers.
      params: its parameters.
      tokens: [B, L] on their slots.
      condition: see `Context`.
      slots: [B, L], the order; None for the system's own.
      drop: without the condition.
    """
    model, batch = system.model, len(tokens)
    own = model.order.slots(None, batch) if slots is None else jnp.asarray(slots, jnp.int32)
    context = Context(own, condition, jnp.full(batch, drop))

    def forced(params: Any, values: Array, context: Context) -> tuple[Array, Array]:
        hidden, target = teacher_forced(model, model.feed.parallel(), params, values, context)
        return model.ask(params, "__call__", hidden), target

    return jax.jit(forced)(params, jnp.asarray(tokens, jnp.int32), context)


def cross_entropy(logits: Array, target: Array) -> Array:
    """[B, L] nats."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]


def greedy(
    system: System, params: Any, condition: Any, batch: int, slots: np.ndarray | None = None, **drawing: Any
) -> np.ndarray:
    """The likeliest token in every step, [B, L] int64, by the library's own sampling loop.

    Args:
      system: the parts.
      params: its parameters.
      condition: see `Context`.
      batch: B.
      slots: [B, L], the order; None for the sampler's own.
      **drawing: see `System.drawing`.
    """
    own = system.sampler.order.slots(None, batch) if slots is None else jnp.asarray(slots, jnp.int32)
    context = Context(own, condition, jnp.zeros(batch, bool))
    told = system.drawing(temperature=0.0, **drawing)
    noise = drawn_from(jax.random.key(0))
    sample = jax.jit(lambda params, context: system.sample_in_order(params, context, noise, told))
    return np.asarray(sample(params, context), np.int64)


def mlp(official: str, ours: str, names: tuple[str, ...], linear: Callable[[str, str], Any]) -> list[Any]:
    """The rules of an MLP of ours, whose projections `up`, `down` (and `gate`) have these names there."""
    return [
        linear(f"{official}.{name}", f"{ours}/{mine}")
        for name, mine in zip(names, ("up", "down", "gate"), strict=False)
    ]
