"""In-painting, out-painting and editing by class: what is given stays, the rest is drawn, whatever the order."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import systems
from ar_jax.config import UsageError, get_config
from ar_jax.feeds.mask import masked_chunk
from ar_jax.heads.noise import Drawn
from ar_jax.heads.protocol import Sampling
from ar_jax.models.generator import Context
from ar_jax.orders.protocol import within
from ar_jax.run import Run, load_data
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.system import from_config

ROOT = Path(__file__).parents[2]
AREA_O = sorted({Path(s.config).stem for s in systems.load().values() if s.area == "O"})
NAMES = [*AREA_O, "llamagen", "mar", "maskgit", "nuwa_infinity"]
SHORT = (
    "llamagen",
    "var",
    "mar",
    "arpg",
    "maskgil",
)  # one of each way of feeding what is given; long tests take the others
# Random parameters leave MaskGIT sure of a single code; its usual temperature, which falls to 0, shows little else.
HOT = {"maskgit": dict(temperature=4.0, temperature_schedule="constant")}
# Random norms behind the embedding or the blocks all but forget the class.
FORGETFUL = ("maskgit", "lpd")
CLOSE = 1e-3  # nats: float32, sums of 64 terms in another order


@functools.cache
def run_of(name: str) -> Run:
    """The smoke variant with parameters that are all away from zero."""
    config = get_config(ROOT / f"configs/{name}.py:smoke")
    system = from_config(config, load_data(config))
    return Run(system, cases.tiny_params(system), config)


def regions_of(run: Run) -> list[np.ndarray]:
    """Masks [1, L] of the left half, the middle, and all but the middle; graphs have no places, so of them every other slot."""
    if len(run.system.tokenizer.layout[0]) < 2:
        every_other = np.arange(run.system.model.order.length)[None] % 2 == 0
        return [every_other, ~every_other]
    height, width = run.system.facts.shape[:2]
    row, column = np.ogrid[:height, :width]
    middle = (abs(2 * row + 1 - height) < height / 2) & (abs(2 * column + 1 - width) < width / 2)
    regions = (np.broadcast_to(2 * column < width, (height, width)), middle, ~middle)
    return [mask for mask in map(run.slots_within, regions) if mask.any() and not mask.all()]


@functools.cache
def judge_of(run: Run, one_free: bool) -> Any:
    """Of tokens, slots and a condition: how much likelier the likeliest token of each answer is, [B, n] nats, and its slots.

    Each is asked for given the tokens before it; with `one_free` only the last slot is, given all others.
    """
    system = run.system
    model = system.model if one_free else system.sampler

    @jax.jit
    def gaps(params: Any, values: jax.Array, slots: jax.Array, condition: Any) -> tuple[jax.Array, jax.Array]:
        batch, length = values.shape[:2]
        context = Context(slots, condition, jnp.full(batch, condition is None))
        if model.feed.has_parallel:
            chunk = model.feed.parallel()
        else:
            chunk = masked_chunk(length, model.num_prefix, jnp.full(batch, length - 1))
        hidden, target = teacher_forced(model, chunk, params, values, context)
        best = model.ask(params, "sample", hidden, Drawn(jax.random.key(0)), Sampling(temperature=jnp.float32(0)))
        likely, own = (model.ask(params, "log_prob", hidden, tokens) for tokens in (best, target))
        return likely - own, slots[:, chunk.answers]

    return functools.partial(gaps, run.params)


def check_that_the_rest_follows(run: Run, labels: Any, given: np.ndarray, mask: np.ndarray) -> None:
    """At temperature 0 what is drawn is the likeliest, given what is told and what was drawn before; what is told is not."""
    system, seed = run.system, 5
    one_free = (
        system.sampler.order.adaptive
    )  # the network chooses what comes next, so of the order only its end is sure
    if one_free:  # another slot in each of many examples
        given, labels = np.repeat(given, 12, axis=0), labels and np.repeat(labels, 12)
        length = mask.shape[1]
        mask = np.arange(length)[None] != (np.arange(len(given)) * length // len(given))[:, None]
    count, cold = len(given), dict(temperature=0.0, guidance_scale=1.0)
    drawn = run.sample_tokens(labels, None if labels is not None else count, seed, given, mask, **cold)
    kept = np.broadcast_to(mask, drawn.shape[:2])
    key = jax.random.split(jax.random.key(seed))[0]
    slots = system.sampler.order.slots(key, count, jnp.asarray(kept))
    condition = system.sampler.complete(run._condition(labels, count)[0], key, count)
    gaps, asked = map(np.asarray, judge_of(run, one_free)(jnp.asarray(drawn), slots, condition))
    told = np.take_along_axis(kept, asked, axis=1)
    assert gaps[~told].max() < CLOSE and (~told).sum() >= (~kept).sum()
    assert one_free or gaps[told].max() > 0.1


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_what_is_given_stays_and_the_rest_is_drawn_from_what_is_likely_beside_it(name: str) -> None:
    """In-painting, out-painting, and editing of a region by its class, for all systems of area O and a few others."""
    run, rng, count = run_of(name), np.random.default_rng(0), 2
    facts, options = run.system.facts, HOT.get(name, {})
    given = run.encode(rng.uniform(-1, 1, (count, *facts.shape)).astype(np.float32))
    labels, others = (
        (([0, 1], [1, 0]) if facts.num_classes == 2 else ([1, 2], [3, 4])) if facts.num_classes else (None,) * 2
    )
    masks = regions_of(run)
    assert masks
    for mask in masks:
        drawn = [
            run.sample_tokens(told, None if told is not None else count, seed, given, mask, **options)
            for told, seed in ((labels, 0), (labels, 1), (others, 0))
        ]
        kept = np.broadcast_to(mask, drawn[0].shape[:2])
        for tokens in drawn:
            np.testing.assert_array_equal(tokens[kept], given[kept].astype(tokens.dtype))
        assert (drawn[1][~kept] != drawn[0][~kept]).any()  # another seed
        assert (drawn[2][~kept] != drawn[0][~kept]).any() or labels is None or name in FORGETFUL  # another class
    if run.system.model.generator.head.has_likelihood:
        check_that_the_rest_follows(run, labels, given, masks[0])


@pytest.mark.parametrize("name", ["llamagen", "var", "mar"])
def test_what_is_given_changes_what_is_drawn_beside_it(name: str) -> None:
    """The seed is the same, only what is given differs. Raster and scales read what comes before, sets read everything."""
    run, mask = run_of(name), run_of(name).slots_within(np.arange(8)[:, None].repeat(8, axis=1) < 4)
    dark, light = (
        run.sample_tokens(
            [1], given=run.encode(np.full((1, 8, 8, 1), level, np.float32)), given_mask=mask, temperature=2.0
        )
        for level in (-1.0, 1.0)
    )
    free = ~np.broadcast_to(mask, dark.shape[:2])
    assert (dark[free] != light[free]).any()


def test_slots_are_within_a_region_where_all_their_pixels_are() -> None:
    pyramid = ((1, 1), (2, 2), (4, 4))
    half = np.zeros((8, 8), bool)
    half[:4] = True
    expected = [False] + [True, True, False, False] + [True] * 8 + [False] * 8
    np.testing.assert_array_equal(within(pyramid, half), expected)
    assert within(pyramid, np.ones((8, 8), bool)).all()
    np.testing.assert_array_equal(within(((2, 2, 3),), half[:2, :2]), [True] * 12)


@pytest.mark.parametrize(("layout", "shape"), [(((5,),), (8, 8)), (((8, 8),), (4, 4)), (((2, 2),), (8,))])
def test_a_region_that_tells_nothing_of_the_slots_is_refused(layout, shape) -> None:
    with pytest.raises(UsageError, match="does not tell which cells"):
        within(layout, np.ones(shape, bool))
