"""NUWA-Infinity (S104): what is near is read and kept, the rest is dropped, and so a network serves images of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ar_jax
from ar_jax import run as runs
from ar_jax.config import UsageError, build
from ar_jax.evaluation import report
from ar_jax.feeds.nearby import nearby
from ar_jax.orders import ORDERS
from ar_jax.orders.protocol import Order
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.system import System

CONFIG = Path(__file__).parents[2] / "configs/nuwa_infinity.py:smoke"
GROWN = {  # order, grid, extent
    "rows of patches": (dict(patch=2), (8, 6), 1),
    "rows from the right, and from below": (dict(patch=2, flip=(0, 1)), (6, 8), 1),
    "columns, far along one axis": (dict(patch=(2, 1), over=dict(kind="column")), (6, 5), (1, 2)),
    "from the border inwards": (dict(patch=2, over=dict(kind="spiral")), (10, 10), 1),
    "from the middle outwards": (dict(patch=2, over=dict(kind="spiral", outward=True)), (10, 10), 1),
    "rings of patches, side by side": (dict(patch=2, over=dict(kind="nearest")), (6, 6), 1),
    "each patch by itself": (dict(patch=2), (4, 4), 0),
    "videos": (dict(patch=(1, 2, 2)), (3, 4, 4), 1),
}


def order_of(options: dict[str, Any], grid: tuple[int, ...]) -> Order:
    return build(ORDERS, {"kind": "patches"} | options, "order", layout=(grid,))


@pytest.mark.parametrize("name", GROWN)
def test_the_pool_holds_all_that_is_near_and_no_more_than_it_must(name: str) -> None:
    options, grid, extent = GROWN[name]
    order, num_prefix = order_of(options, grid), 2
    feed = nearby(order, num_prefix, extent)
    slots = np.argsort(order.step, kind="stable")
    patch = order.position // np.asarray(order.patch)
    pool = np.full(feed.max_len, -9)  # the rank that stands at each place
    most = 0
    for chunk in feed.chunks:
        written = np.asarray(chunk.source[: chunk.num_remembered])
        pool[np.asarray(chunk.at)] = np.where(written < -1, -9, written)
        readers = slots[chunk.place[chunk.place >= 0]]
        step = order.step[slots[np.max(chunk.answers)]]
        near = (np.abs(patch[readers][:, None] - patch[None]) <= np.asarray(extent)).all(axis=2).any(axis=0)
        wanted = set(np.flatnonzero(near & (order.step < step)).tolist())
        assert wanted <= {int(slots[rank]) for rank in pool if rank >= 0}
        later = slots[order.step[slots] >= step - 1]  # who still reads
        near = (np.abs(patch[later][:, None] - patch[None]) <= np.asarray(extent)).all(axis=2).any(axis=0)
        most = max(most, int((near & (order.step < step)).sum()))
    assert feed.max_len <= num_prefix + most + max(order.sizes)
    assert (pool[:num_prefix] == -9).all()  # nothing is put over the prefix


def test_the_state_does_not_grow_with_the_height_of_an_image() -> None:
    """Filled row by row: one row of patches, one patch more, and the one that is being filled."""
    held = [nearby(order_of(dict(patch=4), (height, 24)), 1, 1).max_len for height in (24, 96, 384)]
    assert held[0] == held[1] == held[2] <= 1 + 16 * (24 // 4 + 2)
    whole = nearby(order_of(dict(patch=4, over=dict(kind="random")), (24, 24)), 1, 1)
    assert whole.max_len == 24 * 24 and whole.chunks[0].at is None


def system_of(grid: tuple[int, ...], num_layers: int = 1) -> System:
    return cases.tiny.__wrapped__(
        tokenizer=dict(kind="codes", grids=(grid,), vocab_size=3),
        order="patches",
        feed="nearby",
        backbone="decoder",
        model__num_layers=num_layers,
        model__learned_positions=False,
        model__target_positions=False,
    )


def nats_by_place(system: System, params: Any, values: jax.Array) -> np.ndarray:
    """log p of each token [B, *grid], in one pass."""
    context, chunk = (
        system.model.context(None, len(values), jnp.zeros(len(values), jnp.int32)),
        system.model.feed.parallel(),
    )
    hidden, target = jax.jit(lambda v: teacher_forced(system.model, chunk, params, v, context))(values)
    nats = np.asarray(system.model.ask(params, "log_prob", hidden, target))
    placed = np.empty(values.shape, np.float32)
    placed[:, np.asarray(context.slots)[0][np.asarray(chunk.answers)]] = nats
    return placed.reshape(len(values), *system.tokenizer.layout[0])


def test_a_patch_is_the_same_in_an_image_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one layer, exactly: nothing but the patches around it tells of a patch, wherever it is and whatever is beyond."""
    monkeypatch.setitem(cases.ORDERS, "patches", dict(kind="patches", patch=2))
    small, large = (system_of(grid) for grid in ((6, 6), (14, 10)))
    params = cases.tiny_params(large)
    shapes = (jax.eval_shape(s.init, jax.random.key(0)) for s in (small, large))
    assert jax.tree.structure(params) == jax.tree.structure(next(shapes)) == jax.tree.structure(next(shapes))
    image = np.asarray(cases.tokens(large, 2)).reshape(2, 14, 10)
    whole = nats_by_place(large, params, jnp.asarray(image.reshape(2, -1)))
    for row, col in ((0, 0), (4, 2), (8, 4)):
        piece = image[:, row : row + 6, col : col + 6]
        part = nats_by_place(small, params, jnp.asarray(piece.reshape(2, -1)))
        middle = whole[:, row + 2 : row + 4, col + 2 : col + 4]
        np.testing.assert_allclose(part[:, 2:4, 2:4], middle, atol=1e-4)
    assert np.abs(part - whole[:, 8:14, 4:10]).max() > 0.01  # at the border something is missing
    monkeypatch.setitem(cases.ORDERS, "patches", dict(kind="patches", patch=2, over=dict(kind="column"), flip=(0,)))
    other = nats_by_place(system_of((14, 10)), params, jnp.asarray(image.reshape(2, -1)))
    assert np.abs(other - whole).max() > 0.01  # another direction is another model of the same parameters


def test_one_network_takes_all_directions_and_draws_images_of_another_size() -> None:
    config = ar_jax.get_config(CONFIG)
    config.data.update(height=8, width=8, shrink=8)
    config.eval.data = dict(height=8, width=12)
    run = ar_jax.build_run(config)
    orders = np.asarray(run.system.model.order.slots(jax.random.key(0), 40))
    assert len(np.unique(orders, axis=0)) == 8 == len(config.order.orders)
    other, data = runs.on_other_data(run)
    assert data.shape == (8, 12, 1) and other.params is run.params
    assert other.sample(labels=[0, 1]).shape == (2, 8, 12, 1)
    left = np.zeros((8, 12), bool)
    left[:, :4] = True
    given = other.encode(data.test.take(np.arange(2))["image"])
    grown = other.sample_tokens(labels=[0, 1], given=given, given_mask=other.slots_within(left))
    np.testing.assert_array_equal(grown.reshape(2, 8, 12)[:, :, :4], given.reshape(2, 8, 12)[:, :, :4])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(feed__extent=-1), "extent=-1 must be at least 0"),
        (dict(mixer="linear"), "mixer 'linear' does not heed"),
        (dict(mixer="softmax window"), "goes with plain softmax attention"),
        (dict(backbone="block_transformer"), "this backbone does not heed"),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        system = cases.tiny.__wrapped__(**dict(order="patches", feed="nearby") | changes)
        jax.eval_shape(system.init, jax.random.key(0))


@pytest.mark.slow
def test_what_was_learned_on_small_images_holds_for_large_ones(tmp_path) -> None:
    """The bits of a pixel are no more on pictures of 20 x 28 than on those of 12 x 12 that were learned from."""
    config = ar_jax.get_config(CONFIG)
    config.mesh = dict(data=1)
    run = ar_jax.train(config, tmp_path)
    other, data = runs.on_other_data(run)
    small = report.held_out(run, runs.load_data(run.config))["bits_per_dim"]
    large = report.held_out(other, data)["bits_per_dim"]
    assert len(run.config.order.orders) == 8 and other.sample(labels=[0, 1]).shape == (2, 20, 28, 1)
    assert small < 1.0 and large < small + 0.1  # 3 bits if nothing is known
