"""One loop generates with every order: it walks the steps of a feed, draws their tokens, and writes them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from ar_jax.feeds.protocol import Chunk, Feed
from ar_jax.heads.noise import Drawn, Noise
from ar_jax.heads.protocol import Sampling
from ar_jax.kernels.dispatch import platform
from ar_jax.mixers.protocol import State, take
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.decoder import layers_apart
from ar_jax.models.generator import Context

Params = Any
Carry = Any
Step = Array | np.integer[Any]
NoiseOfStep = Callable[[Step, Array], Noise]  # of a step's number, and the slots [B, n] that it draws for


@struct.dataclass
class Given:
    """Tokens that are not drawn but kept: for in-painting, out-painting and continuation.

    Attributes:
      values: [B, L] int32 or [B, L, C] float, on their slots.
      mask: [B, L] bool, where they are given.
    """

    values: Array
    mask: Array


def drawn_from(key: Array) -> NoiseOfStep:
    """Fresh noise for every step."""
    return lambda step, slots: Drawn(jax.random.fold_in(key, step))


def walk(feed: Feed, body: Callable[[Carry, Step, Chunk], Carry], carry: Carry) -> Carry:
    """Runs `body(carry, step, chunk)` over all steps: one scan per run of steps of equal shape.

    The step of a run of one, and its chunk, are known while the program is built.
    """
    for first, run in feed.runs():
        if len(run.target) == 1:
            carry = body(carry, np.int32(first), jax.tree.map(lambda a: a[0], run))
            continue
        steps = jnp.arange(first, first + len(run.target))
        carry, _ = jax.lax.scan(lambda c, x: (body(c, *x), None), carry, (steps, jax.tree.map(jnp.asarray, run)))
    return carry


def generate(
    model: Autoregressive,
    params: Params,
    context: Context,
    noise: NoiseOfStep,
    settings: Sampling,
    guidance_scales: ArrayLike | None = None,
    given: Given | None = None,
    temperature_factors: ArrayLike | None = None,
) -> Array:
    """Generates a batch. Compiled whole by the caller; nothing leaves the device before the last token.

    Args:
      model: network, order and feed.
      params: see Autoregressive.
      context: the order of each of the B examples, and its condition.
      noise: where draws come from, such as `drawn_from(key)`.
      settings: temperature and filters.
      guidance_scales: [num_steps] scales of classifier-free guidance, or [num_steps, L] for each rank its own; None runs the
        model once per step instead of twice. A step is an evaluation of the network.
      given: tokens to keep.
      temperature_factors: [num_steps], the temperature is multiplied with in each step; None for ones.

    Returns:
      [B, L] int32 or [B, L, C] float32 tokens on their slots.
    """
    feed, batch, guided = model.feed, len(context.slots), guidance_scales is not None
    if feed.remembers and platform() == "cpu":
        params = layers_apart(params)
    scales, factors = jax.tree.map(jnp.asarray, (guidance_scales, temperature_factors))
    rows = batch * (1 + guided)
    state = None
    if feed.remembers:
        # The barrier hides from XLA that the state is zeros: its CPU backend would write the first entries by padding them,
        # number by number, which takes longer than the step.
        state = jax.lax.optimization_barrier(model.generator.decoder.init_state(rows, feed.max_len, feed.max_step_len))
    values = model.empty_values(batch)
    values = (
        values if given is None else jnp.where(_over(given.mask, values), given.values.astype(values.dtype), values)
    )
    method = "sample_with_confidence" if model.order.adaptive else "sample"

    def body(carry: tuple[Array, Array, State], step: Step, chunk: Chunk) -> tuple[Array, Array, State]:
        values, slots, state = carry
        if given is not None and feed.beside_given is not None:
            chunk = feed.beside_given(chunk, jnp.tile(take(given.mask, slots), (1 + guided, 1)))
        now, passed_on = dataclasses.replace(context, slots=slots), None
        warm = settings if factors is None else _warmed(settings, factors[step])
        for stage in range(model.num_stages):
            seen, fed = (jnp.concatenate([values, values]), both_branches(now)) if guided else (values, now)
            hidden, passed_on, state = model.read_stage(stage, params, seen, fed, chunk, state, passed_on)
            answering = chunk if model.num_stages == 1 else chunk.stage(stage)
            hidden = answering.pick(hidden)
            asked = slots[:, jnp.maximum(answering.answers, 0)]  # [B, n]
            steered = () if scales is None else (hidden[batch:], _scale_of(scales[step], answering))
            source = noise(step, asked) if model.num_stages == 1 else noise(step, asked).fold_in(stage)
            told: dict[str, Any] = {"part": answering.part}
            if given is not None and getattr(model.generator.head, "draws_jointly", False):
                told["given"] = (take(values, asked), take(given.mask, asked))
            out = model.ask(params, method, hidden[:batch], source, warm, *steered, **told)
            drawn, confidence = out if model.order.adaptive else (out, None)
            kept = jnp.broadcast_to(answering.answers < 0, asked.shape)
            if given is not None:
                kept |= take(given.mask, asked)
            values = _written(values, drawn, asked, kept)
        if confidence is not None:
            heat = warm.temperature if warm.confidence_temperature is None else warm.confidence_temperature
            confidence = confidence + heat * source.gumbel("confidence", confidence.shape)
            slots = surest_first(slots, confidence, kept)
        return values, slots, state

    return model.finished(walk(feed, body, (values, context.slots, state))[0])


def surest_first(slots: Array, confidence: Array, kept: Array) -> Array:
    """Slots [B, L] in a new order: those that are kept [B, L] as they stand, then the others, the surest of them first."""
    order = jnp.argsort(jnp.where(kept, -jnp.inf, -confidence), axis=1, stable=True)
    return jnp.take_along_axis(slots, order, axis=1)


def both_branches(context: Context) -> Context:
    """The batch twice: with its condition, then without."""
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), context)
    return dataclasses.replace(twice, drop=jnp.concatenate([context.drop, jnp.ones_like(context.drop)]))


def _scale_of(scale: Array, chunk: Chunk) -> Array:
    """The scale of a step, or [1, n, 1] those of its answers."""
    return scale if scale.ndim == 0 else scale[jnp.maximum(chunk.answers, 0)][None, :, None]


def _warmed(settings: Sampling, factor: Array) -> Sampling:
    if settings.confidence_temperature is not None:
        return dataclasses.replace(settings, confidence_temperature=settings.confidence_temperature * factor)
    return dataclasses.replace(settings, temperature=settings.temperature * factor)


def _written(values: Array, drawn: Array, slots: Array, kept: Array) -> Array:
    """The values with what was drawn on its slots [B, n], but where what is there is kept."""
    # Each kept one is sent to a place of its own behind the end, which drops it.
    places = jnp.where(kept, values.shape[1] + jnp.arange(slots.shape[1])[None], slots)
    rows = jnp.arange(len(values))[:, None]
    return values.at[rows, places].set(drawn.astype(values.dtype), mode="drop", unique_indices=True)


def _over(mask: Array, values: Array) -> Array:
    """A mask [B, T] with axes of size 1 up to the rank of `values`."""
    return mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
