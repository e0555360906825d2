"""A sampler is one program: it compiles once, a seed fixes what it draws, and without noise it takes the likeliest."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.run import Run
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.system import compiled

LOOPS = [
    ("softmax", "raster", "shift"),
    ("linear", "subsample", "query"),
    ("softmax", "next_scale", "resize"),
    ("softmax", "random, in sets", "mask"),
]
GREEDY = [(mixer, "raster") for mixer in ("softmax", "linear", "convolution")]
GREEDY += [("linear", "subsample"), ("softmax", "next_scale")]
LABELS = np.arange(24) % 3
USUAL: dict[str, Any] = {"labels": LABELS, "top_k": 3, "top_p": 0.99, "min_p": 0.01, "guidance_scale": 2.0}


@functools.cache
def run_of(mixer: str, order: str, feed: str) -> Run:
    system = cases.tiny(mixer, order, feed, side=2)
    return Run(system, cases.tiny_params(system), {})


@pytest.mark.parametrize(("mixer", "order", "feed"), LOOPS)
def test_a_sampler_compiles_once_for_all_keys_labels_and_settings(mixer: str, order: str, feed: str) -> None:
    run = run_of(mixer, order, feed)
    like = (1, run.system.model.order.length)
    nothing = {"given": np.zeros(like), "given_mask": np.zeros(like, bool)}
    calls: list[dict[str, Any]] = [
        {},
        {"seed": 7},
        {"labels": LABELS[::-1]},
        {"temperature": 0.5},
        {"temperature": 0},
        {"temperature": np.float64(1.25)},
        {"top_k": 1},
        {"top_p": 1},
        {"min_p": np.float32(0)},
        {"guidance_scale": 4},
        {"guidance_schedule": "linear"},
        {"given": np.ones(like), "given_mask": np.ones(like, bool)},
    ]
    before = compiled(run.system.sample).jitted(None)._cache_size()
    for call in calls:
        run.sample_tokens(**{**USUAL, **nothing, **call})
    assert compiled(run.system.sample).jitted(None)._cache_size() == before + 1


@pytest.mark.parametrize(("mixer", "order", "feed"), LOOPS)
def test_a_seed_fixes_samples_to_the_bit_and_another_one_changes_them(mixer: str, order: str, feed: str) -> None:
    run = run_of(mixer, order, feed)
    like = (1, run.system.model.order.length)
    nothing = {"given": np.zeros(like), "given_mask": np.zeros(like, bool)}
    first, again, other = (run.sample_tokens(**USUAL, **nothing, seed=seed) for seed in (11, 11, 12))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).mean() > 0.5


@pytest.mark.parametrize(("mixer", "order"), GREEDY)
def test_at_temperature_zero_every_token_is_the_likeliest_by_the_parallel_form(mixer: str, order: str) -> None:
    run = run_of(mixer, order, "auto")
    model = run.system.model
    greedy = run.sample_tokens(LABELS, temperature=0)
    np.testing.assert_array_equal(greedy, run.sample_tokens(LABELS, temperature=0, seed=1))  # no noise is left

    @jax.jit
    def likeliest(params: Any, values: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = model.context(None, len(values), labels)
        hidden, tokens = teacher_forced(model, model.feed.parallel(), params, values, context)
        return model.ask(params, "__call__", hidden).argmax(axis=-1), tokens

    expected, tokens = likeliest(run.params, jnp.asarray(greedy), jnp.asarray(LABELS))
    np.testing.assert_array_equal(tokens, expected)
    assert len(np.unique(greedy)) > 1  # not all the same, which would prove little
