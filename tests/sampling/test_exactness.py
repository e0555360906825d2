"""Likelihoods are exact and samples follow them: on a 2x2 grid of 3 levels all images can be listed and counted."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.heads.protocol import Sampling
from ar_jax.models.generator import Context
from ar_jax.sampling.guidance import guidance_scales
from ar_jax.sampling.likelihood import log_prob, teacher_forced
from ar_jax.sampling.loop import Given, drawn_from, generate
from ar_jax.system import System

LEVELS, LABEL, NUM_SAMPLES = 3, 1, 4000
REJECT = 1e-3  # the seeds are fixed, so a test that passes once passes always
EVERY_ORDER = ("softmax", "linear")
CAUSAL = [(mixer, order, "auto") for mixer in EVERY_ORDER for order in cases.ORDERS]
CAUSAL += [("softmax", "nearest", "neighbors"), ("softmax", "raster", "merge"), ("softmax", "blocks", "merge")]
CAUSAL += [(mixer, "raster", "auto") for mixer in ("convolution", "softmax window", "hybrid")]
MASKED = [("softmax", order, "mask") for order in ("random, in sets", "raster", "blocks")]
LOOPS = [
    ("softmax", "raster", "shift"),
    ("softmax", "nearest", "query"),
    ("softmax", "nearest", "neighbors"),
    ("softmax", "raster", "merge"),
    ("softmax", "raster", "recent"),
    ("softmax", "next_scale", "resize"),
    ("softmax", "blocks", "resize"),
    ("softmax", "random", "shift"),
    ("softmax", "random, in sets", "mask"),
    ("linear", "raster", "shift"),
    ("convolution", "raster", "shift"),
    ("hybrid", "raster", "shift"),
]


def tiny(mixer: str, order: str, feed: str) -> System:
    """A system on 2x2 images of 3 levels; a pyramid has 1 + 4 tokens."""
    fitting: dict[str, Any] = {"parallel_groups": {"order__regions": (1, 2)}, "patches": {"order__patch": (2, 1)}}
    fitting = fitting.get(order, {})
    if (order, feed) == ("raster", "merge"):
        fitting = {"model__branch_layers": (1,), "head__num_outputs": 2}
    merged = "decoder, shuffled tokens" if order == "blocks" else "decoder, drawing between layers"
    backbone = {"neighbors": "decoder, two outputs", "merge": merged}.get(feed, "decoder")
    return cases.tiny(mixer, order, feed, backbone, side=2, levels=LEVELS, **fitting)


def everything(length: int) -> np.ndarray:
    """[3^L, L] int32: all there is, in the order of its numbers to base 3."""
    return np.asarray(list(itertools.product(range(LEVELS), repeat=length)), np.int32)


def number(values: np.ndarray) -> np.ndarray:
    """The row of `everything` that each row of values is."""
    return values @ LEVELS ** np.arange(values.shape[1])[::-1]


def one_context(system: System, batch_size: int) -> Context:
    """The same order and class for all examples."""
    one = system.model.context(jax.random.key(3), 1, jnp.full(1, LABEL, jnp.int32))
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (batch_size, *a.shape[1:])), one)


PROGRAMS: dict[Any, Any] = {}


def likelihood_of(mixer: str, system: System) -> Any:
    """log_prob, compiled. Orders whose feed and positions are the same share the program: they differ in slots only."""
    arrays = [np.asarray(a).tobytes() for chunk in system.model.feed.chunks for a in jax.tree.leaves(chunk)]
    remembered = [chunk.num_remembered for chunk in system.model.feed.chunks]
    key = (mixer, system.model.order.position.tobytes(), *arrays, *remembered)
    return PROGRAMS.setdefault(key, jax.jit(functools.partial(log_prob, system.model)))


@functools.cache
def exact(mixer: str, order: str, feed: str) -> np.ndarray:
    """[3^L] float64: p(x | order, class) of all x."""
    system = tiny(mixer, order, feed)
    values = everything(system.model.order.length)
    log_p = likelihood_of(mixer, system)(cases.tiny_params(system), values, one_context(system, len(values)))
    return np.exp(np.asarray(log_p, np.float64))


@functools.cache
def sampler(system: System) -> Any:
    def draw(params: Any, context: Context, key: jax.Array, settings: Any, scales: Any, given: Any) -> jax.Array:
        return generate(system.model, params, context, drawn_from(key), settings, scales, given)

    return jax.jit(draw)


def draw(system: System, temperature: float = 1.0, scales: Any = None, given: Given | None = None) -> np.ndarray:
    """[NUM_SAMPLES, L] samples of one order and class."""
    settings = Sampling(temperature=jnp.float32(temperature))
    context = one_context(system, NUM_SAMPLES)
    arguments = (cases.tiny_params(system), context, jax.random.key(4), settings, scales, given)
    return np.asarray(sampler(system)(*arguments))


def p_value(samples: np.ndarray, probability: np.ndarray) -> float:
    """Of Pearson's test that samples come from `probability`; cells where fewer than five are expected are one cell."""
    counts = np.bincount(number(samples), minlength=len(probability))
    expected = probability / probability.sum() * len(samples)
    common = expected >= 5
    observed, expected = (np.append(a[common], a[~common].sum()) for a in (counts, expected))
    if expected[-1] < 5:  # what is rare is rare together as well
        observed, expected = (np.append(a[:-2], a[-2:].sum()) for a in (observed, expected))
    assert len(observed) > 5  # there is something to compare
    return float(stats.chisquare(observed, expected).pvalue)


@pytest.mark.parametrize(("mixer", "order", "feed"), CAUSAL + MASKED)
def test_the_probabilities_of_all_images_sum_to_one(mixer: str, order: str, feed: str) -> None:
    probability = exact(mixer, order, feed)
    assert probability.max() > 3 * probability.min()  # not merely uniform
    assert abs(probability.sum() - 1) < 1e-5  # float32: five log-softmaxes of 3 terms, 1e-7 each, and a product of them


@pytest.mark.parametrize(("mixer", "order", "feed"), LOOPS)
def test_samples_follow_the_exact_distribution_and_no_other(mixer: str, order: str, feed: str) -> None:
    system = tiny(mixer, order, feed)
    assert p_value(draw(system), exact(mixer, order, feed)) > REJECT
    assert p_value(draw(system, temperature=1.5), exact(mixer, order, feed)) < REJECT


def step_logits(system: System, params: Any, values: np.ndarray, context: Context) -> jax.Array:
    """[B, L, V] logits of a raster scan's tokens from the parallel form."""
    hidden, _ = teacher_forced(system.model, system.model.feed.parallel(), params, jnp.asarray(values), context)
    return system.model.ask(params, "__call__", hidden)


@pytest.mark.parametrize(("feed", "schedule"), [("shift", "constant"), ("shift", "linear"), ("merge", "linear_before")])
def test_guided_samples_follow_the_guided_distribution_of_every_step(feed: str, schedule: str) -> None:
    """Each step draws from softmax(u + s (c - u)), with the scale s of that step; all codes of a place have one scale."""
    system = tiny("softmax", "raster", feed)
    values, sizes = everything(system.model.order.length), system.model.step_sizes
    scales = guidance_scales(sizes, 2.5, schedule)
    context = one_context(system, len(values))
    logits = jax.jit(functools.partial(step_logits, system))
    params = cases.tiny_params(system)
    told, untold = (logits(params, values, context.replace(drop=jnp.full(len(values), drop))) for drop in (False, True))
    guided = jax.nn.log_softmax(untold + np.repeat(scales, sizes)[None, :, None] * (told - untold))
    log_p = np.take_along_axis(np.asarray(guided, np.float64), values[..., None], axis=-1)[..., 0].sum(axis=1)
    samples = draw(system, scales=jnp.asarray(scales))
    assert p_value(samples, np.exp(log_p)) > REJECT
    assert p_value(samples, exact("softmax", "raster", feed)) < REJECT


@pytest.mark.parametrize("feed", ["shift", "merge"])
def test_after_a_given_prefix_the_rest_follows_the_exact_conditional(feed: str) -> None:
    """Where layers read what was drawn before them, they read what is given instead."""
    system = tiny("softmax", "raster", feed)
    values, mask = np.asarray([2, 0, 1, 1], np.int32), np.asarray([True, False, False, False])
    samples = draw(system, given=Given(*(jnp.tile(jnp.asarray(a)[None], (NUM_SAMPLES, 1)) for a in (values, mask))))
    kept = everything(4)[:, 0] == 2
    assert (samples[:, 0] == 2).all()
    assert p_value(samples, np.where(kept, exact("softmax", "raster", feed), 0)) > REJECT


def test_tokens_given_at_the_end_of_a_scan_are_kept_and_what_comes_before_is_drawn_as_ever() -> None:
    system = tiny("softmax", "raster", "shift")
    values, mask = np.asarray([0, 0, 0, 2], np.int32), np.asarray([False, False, False, True])
    samples = draw(system, given=Given(*(jnp.tile(jnp.asarray(a)[None], (NUM_SAMPLES, 1)) for a in (values, mask))))
    before = exact("softmax", "raster", "shift").reshape(-1, LEVELS).sum(axis=1)  # p(x_1, x_2, x_3)
    assert p_value(samples, np.kron(before, [0, 0, 1])) > REJECT


@pytest.mark.parametrize(("order", "feed"), [("random", "shift"), ("random, in sets", "mask")])
def test_a_shuffled_order_takes_given_tokens_first_and_draws_the_rest_given_them(order: str, feed: str) -> None:
    """The exact conditional of the two free slots is the mean over the orders that begin with the given ones."""
    system = tiny("softmax", order, feed)
    values, mask = np.asarray([2, 0, 0, 1], np.int32), np.asarray([True, False, False, True])
    given = Given(*(jnp.tile(jnp.asarray(a)[None], (NUM_SAMPLES, 1)) for a in (values, mask)))
    drop, labels = jnp.zeros(NUM_SAMPLES, bool), jnp.full(NUM_SAMPLES, LABEL)
    params, drawing = cases.tiny_params(system), system.drawing()
    samples = np.asarray(jax.jit(system.sample)(params, jax.random.key(5), labels, drop, drawing, given))
    assert (samples[:, mask] == values[mask]).all()

    everyone = everything(4)
    slots = np.asarray([[*a, *b] for a in ([0, 3], [3, 0]) for b in ([1, 2], [2, 1])], np.int32)
    context = one_context(system, len(everyone) * len(slots)).replace(slots=jnp.repeat(slots, len(everyone), axis=0))
    log_p = jax.jit(functools.partial(log_prob, system.model))(params, jnp.tile(everyone, (len(slots), 1)), context)
    probability = np.exp(np.asarray(log_p, np.float64)).reshape(len(slots), -1)
    kept = (everyone[:, mask] == values[mask]).all(axis=1)
    conditional = np.where(kept, probability, 0) / probability[:, kept].sum(axis=1, keepdims=True)
    assert p_value(samples, conditional.mean(axis=0)) > REJECT
