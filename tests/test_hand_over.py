"""One model begins and another fills in the rest; parameters in changed systems: told tokens, larger images."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ar_jax
from ar_jax import hand_over
from ar_jax import run as runs
from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError, get_config
from ar_jax.data.protocol import Facts
from ar_jax.evaluation import report
from ar_jax.models.generator import Context
from ar_jax.orders.random import cosine_shares
from ar_jax.run import Run
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.system import from_config, stopped

ROOT = Path(__file__).parents[1]
DIGITS = Facts("image", (8, 8, 1), 17, tuple("0123456789"))


@functools.cache
def run_of(name: str) -> Run:
    """The smoke variant with parameters that are all away from zero."""
    config = get_config(ROOT / f"configs/{name}.py:smoke")
    system = from_config(config, DIGITS)
    return Run(system, cases.tiny_params(system), config)


def test_maskgil_fills_in_in_8_evaluations_what_llamagen_has_begun_in_16() -> None:
    """S033: 24 network evaluations, where the raster model alone takes 64. What was begun stays; all of it is read."""
    first, second = run_of("llamagen"), run_of("maskgil")
    filler = hand_over.told(second, 16)
    assert hand_over.num_evaluations(first) == 64 and hand_over.num_evaluations(filler) == 8
    assert filler.system.sampler.step_sizes == tuple(cosine_shares(48, 8)) and filler.params is second.params
    known = first.slots_after(16)
    np.testing.assert_array_equal(known, (np.arange(64) < 16)[None])

    whole = first.sample_tokens([1, 2], seed=3)
    begun = first.sample_tokens([1, 2], seed=3, num_steps=16)
    np.testing.assert_array_equal(begun[:, :16], whole[:, :16])  # the same draws, and nothing behind them
    assert not begun[:, 16:].any() and whole[:, 16:].any()
    both = hand_over.hand_over(first, second, 16, [1, 2], seed=3)
    np.testing.assert_array_equal(both[:, :16], begun[:, :16])
    assert (both[:, 16:] != whole[:, 16:]).any() and both.shape == whole.shape

    other = begun.copy()
    other[:, :16] = 16 - other[:, :16]
    changed = filler.sample_tokens([1, 2], seed=3, given=other, given_mask=known)
    assert (changed[:, 16:] != both[:, 16:]).any()  # what is filled in depends on what was begun


def test_the_program_of_the_first_ends_where_it_hands_over() -> None:
    """Its FLOPs are those of its steps: nothing of what is left is computed and thrown away."""
    run, key, drop = run_of("llamagen"), jax.random.key(0), np.zeros(2, bool)
    labels, drawing = np.asarray([1, 2], np.int32), run.system.drawing()
    cost = {
        n: flops(lambda p, n=n: stopped(run.system, n).sample(p, key, labels, drop, drawing.first(n)), run.params)
        for n in (16, 64)
    }
    assert cost[16] < 0.3 * cost[64]


@pytest.mark.parametrize("name", ["maskgil", "mar", "arpg", "oar"])
def test_no_evaluation_is_spent_on_what_is_told(name: str) -> None:
    """In-painting with a schedule of its own: all steps are for what is left."""
    run = run_of(name)
    length = run.system.model.order.length
    config = run.config.copy_and_resolve_references()
    config.sampling.order = dict(config.sampling.get("order") or config.order) | {
        "num_told": length // 2,
        "num_steps": 4,
    }
    half = run.rebuilt(config)
    steps = half.system.sampler.step_sizes
    assert len(steps) == hand_over.num_evaluations(half) == 4 and sum(steps) == length - length // 2
    given = run.encode(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32))
    mask = np.arange(length)[None] % 2 == 0
    drawn = half.sample_tokens([1, 2], given=given, given_mask=mask, seed=1)
    np.testing.assert_array_equal(drawn[:, mask[0]], given[:, mask[0]])
    assert (drawn[:, ~mask[0]] != given[:, ~mask[0]]).any()
    more = mask | (np.arange(length)[None] < length // 4)  # more than was told is kept, too
    np.testing.assert_array_equal(
        half.sample_tokens([1, 2], given=given, given_mask=more)[:, more[0]], given[:, more[0]]
    )
    with pytest.raises(UsageError, match=f"num_told={length // 2} takes so many tokens of each example for given"):
        half.sample_tokens([1, 2])
    with pytest.raises(UsageError, match="takes so many tokens of each example for given"):
        half.sample_tokens([1, 2], given=given, given_mask=np.arange(length)[None] < 3)


@functools.cache
def likelihood_of(run: Run) -> Any:
    """Nats of each token [B, L] in an order of slots [L], by rank, compiled."""
    model = run.system.model

    @jax.jit
    def nats(params: Any, slots: jax.Array, values: jax.Array) -> jax.Array:
        batch = len(values)
        context = Context(jnp.broadcast_to(slots[None], values.shape), jnp.arange(batch), jnp.zeros(batch, bool))
        hidden, target = teacher_forced(model, model.feed.parallel(), params, values, context)
        return model.ask(params, "log_prob", hidden, target)

    return lambda slots, values: np.asarray(nats(run.params, slots, values.reshape(len(values), -1)))


def test_arpg_goes_on_beyond_the_grid_that_it_was_trained_on() -> None:
    """S052, expansion: the left half of an image twice as wide is an image; the right half is drawn with it in view.

    Rotary positions go on: in the trained part likelihoods are the same, and places beyond it are told apart.
    """
    run = run_of("arpg")
    wide = run.rebuilt(shape=(8, 16, 1))
    assert wide.params is run.params and wide.system.tokenizer.layout == ((8, 16),)
    assert hand_over.num_evaluations(wide) == 16  # as many steps as on the trained grid
    rng = np.random.default_rng(0)
    values, left = rng.integers(0, 17, (2, 8, 16)).astype(np.int32), rng.permutation(64)
    slots = np.concatenate([left // 8 * 16 + left % 8, np.arange(64) // 8 * 16 + 8 + np.arange(64) % 8])
    small = likelihood_of(run)(left, values[:, :, :8])
    values[:, 0, 8], values[:, 7, 15] = values[:, 7, 15].copy(), values[:, 7, 15].copy()
    large = likelihood_of(wide)(slots, values)
    np.testing.assert_allclose(large[:, :64], small, atol=1e-4)  # float32, sums of 64 terms
    slots[[64, -1]] = slots[[-1, 64]]  # the first token behind the left half is asked for in another place
    assert (np.abs(likelihood_of(wide)(slots, values) - large)[:, 64] > 1e-3).all()

    few = run.config.copy_and_resolve_references()
    few.sampling.order.num_steps = 4
    run, wide = run.rebuilt(few), wide.rebuilt(few)
    image = run.sample([3, 4], seed=1)
    canvas = np.concatenate([image, np.zeros_like(image)], axis=2)
    region = np.zeros((8, 16), bool)
    region[:, :8] = True
    grown = [
        wide.sample([3, 4], given=wide.encode(canvas), given_mask=wide.slots_within(region), seed=seed)
        for seed in (0, 1)
    ]
    for one in grown:
        assert one.shape == (2, 8, 16, 1)
        np.testing.assert_array_equal(one[:, :, :8], image)
    assert (grown[0][:, :, 8:] != grown[1][:, :, 8:]).any()


@pytest.mark.slow
def test_what_arpg_learned_on_small_images_holds_for_larger_ones(tmp_path: Path) -> None:
    """S052: the bits of a pixel of pictures of 12 x 20 and 20 x 28 are those of the 12 x 12 that were learned from."""
    config = get_config(ROOT / "configs/arpg.py:smoke")
    config.data, config.tokenizer = dict(kind="crops", height=12, width=12, shrink=2), dict(kind="pixels", levels=8)
    config.train.update(num_steps=60, batch_size=32)
    config.eval.update(batch_size=64)
    config.mesh = dict(data=1)
    run = ar_jax.train(config, tmp_path)
    small = report.held_out(run, runs.load_data(run.config))["bits_per_dim"]
    assert small < 0.8  # 3 if nothing is known
    for sides in (dict(height=12, width=20), dict(height=20, width=28)):
        run.config.eval.data = sides
        other, data = runs.on_other_data(run)
        assert report.held_out(other, data)["bits_per_dim"] < small + 0.05


def test_places_that_were_learned_end_where_they_were_trained() -> None:
    with pytest.raises(UsageError, match=r"shape \(8, 16, 1\), which this model's parameters do not fit.*places"):
        run_of("rar").rebuilt(shape=(8, 16, 1))


@pytest.mark.slow
def test_the_command_draws_by_two_trained_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user types it, on two runs of the same digits."""
    for name in ("llamagen", "maskgil"):
        config = get_config(ROOT / f"configs/{name}.py:smoke")
        config.mesh = dict(data=1)
        ar_jax.train(config, tmp_path / name)
    out = tmp_path / "samples.png"
    flags = [f"--first={tmp_path}/llamagen", f"--second={tmp_path}/maskgil", "--num_steps=16", f"--out={out}"]
    hand_over.main(["hand_over", *flags])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["network_evaluations"] == {"first": 64, "second": 8, "both": 24}
    assert all(seconds > 0 for seconds in told["seconds_per_sample"].values()) and out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("attempt", "told"),
    [
        (lambda: hand_over.hand_over(run_of("llamagen"), run_of("mar"), 4, [1]), "The models draw different tokens"),
        (lambda: hand_over.hand_over(run_of("llamagen"), run_of("rar"), 4, [1]), "order 'raster', which cannot"),
        (lambda: hand_over.hand_over(run_of("llamagen"), run_of("llamagen"), 4, [1]), "order 'raster', which cannot"),
        (lambda: hand_over.hand_over(run_of("maskgil"), run_of("maskgil"), 4, [1]), "no slots are the first of all"),
        (lambda: hand_over.hand_over(run_of("llamagen"), run_of("maskgil"), 65, [1]), "between 1 and 64"),
        (lambda: hand_over.hand_over(run_of("llamagen"), run_of("maskgil"), 60, [1]), "num_steps=8 must lie between"),
        (lambda: hand_over.told(run_of("maskgil"), 64), "num_told=64 must be at least 0 and below"),
        (lambda: hand_over.main(["hand_over", "--first=a", "--second=b", "--num_steps=1", "c"]), "'c' is not a flag"),
    ],
)
def test_what_cannot_be_handed_over_is_told(attempt: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        attempt()


def test_only_sampling_is_told_tokens() -> None:
    config = get_config(ROOT / "configs/maskgil.py:smoke")
    config.order.num_told = 3
    with pytest.raises(UsageError, match="set config.sampling.order.num_told instead"):
        from_config(config, DIGITS)
