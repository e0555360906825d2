"""Orders: what holds for each on any layout, and small ones written out by hand."""

from __future__ import annotations

from typing import Any

import cases
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_jax.config import UsageError, build
from ar_jax.orders import ORDERS
from ar_jax.orders.protocol import Layout, Order, coordinates
from ar_jax.orders.random import SIZES, cosine_sizes, uniform_sizes

PYRAMID: Layout = ((1, 1), (2, 2), (4, 4))
ON_PYRAMIDS = ("raster", "random", "next_scale")
KINDS = {
    name: {k: v for k, v in row.items() if k not in ("start", "regions", "num_steps", "patch")}
    for name, row in cases.ORDERS.items()
}  # options that fit any grid


def make(layout: Layout, **options: Any) -> Order:
    return build(ORDERS, options, "order", layout=layout)


def check(order: Order, layout: Layout) -> None:
    """Every slot has one step and one place, every step a slot, and the slots come step by step."""
    length = sum(int(np.prod(grid)) for grid in layout)
    assert order.length == length == sum(order.sizes)
    assert set(order.step.tolist()) == set(range(order.num_steps)) and min(order.sizes) > 0
    np.testing.assert_array_equal(order.position, coordinates(layout))
    assert len(np.unique(order.position, axis=0)) == length
    if not order.shuffled:
        slots = np.asarray(order.slots(None, 1)[0])
        np.testing.assert_array_equal(np.sort(slots), np.arange(length))
        np.testing.assert_array_equal(order.step[slots], np.sort(order.step))


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"next_scale"}))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_every_order_is_a_partition_of_any_grid_into_steps(name: str, grid: list[int]) -> None:
    options, layout = KINDS[name], (tuple(grid),)
    if name.startswith("spiral") and len(grid) < 2:
        with pytest.raises(UsageError, match="at least two axes"):
            make(layout, **options)
    elif name == "parallel_groups":
        check(make(layout, **options, regions=tuple(n if n < 4 else 1 + (n == 4) for n in grid)), layout)
    elif name == "patches":
        check(make(layout, **options, patch=tuple(n if n < 4 else 1 + (n == 4) for n in grid)), layout)
    elif name in ("random, in sets", "locality"):
        check(make(layout, **options, num_steps=1 + int(np.prod(grid)) // 3), layout)
    else:
        check(make(layout, **options), layout)


@pytest.mark.parametrize("name", KINDS)
def test_orders_of_a_pyramid_are_partitions_and_others_refuse_it(name: str) -> None:
    if KINDS[name]["kind"] in ON_PYRAMIDS:
        check(make(PYRAMID, **KINDS[name]), PYRAMID)
    else:
        with pytest.raises(UsageError, match="one grid"):
            make(PYRAMID, **KINDS[name])


HAND = [
    ({"kind": "raster"}, (2, 3), "012 345"),
    ({"kind": "column"}, (2, 3), "024 135"),
    ({"kind": "column"}, (2, 1, 2), "02 13"),
    ({"kind": "right_to_left"}, (4,), "3210"),
    ({"kind": "right_to_left"}, (2, 3), "210 543"),
    ({"kind": "right_to_left", "columns": True}, (2, 3), "420 531"),
    ({"kind": "diagonal"}, (2, 3), "013 245"),
    ({"kind": "diagonal", "parallel": True}, (2, 3), "012 123"),
    ({"kind": "diagonal", "parallel": True}, (2, 2, 2), "01 12 12 23"),
    ({"kind": "spiral"}, (3, 4), "0123 9ab4 8765"),
    ({"kind": "spiral"}, (4, 3), "012 9a3 8b4 765"),
    ({"kind": "spiral", "outward": True}, (3, 4), "ba98 2107 3456"),
    ({"kind": "spiral"}, (2, 2, 2), "01 32 45 76"),
    ({"kind": "spiral"}, (1, 4), "0123"),
    ({"kind": "spiral"}, (3, 1), "0 1 2"),
    ({"kind": "nearest"}, (3, 3), "012 123 234"),
    ({"kind": "nearest", "start": 1}, (3, 3), "212 101 212"),
    ({"kind": "nearest", "start": (0, 2)}, (2, 3), "210 321"),
    ({"kind": "nearest", "start": 2}, (5,), "21012"),
    ({"kind": "nearest", "start": 1, "parallel": False}, (3, 3), "516 203 748"),
    ({"kind": "subsample"}, (4, 4), "0212 2222 1212 2222"),
    ({"kind": "subsample", "levels": 1}, (4, 4), "0101 1111 0101 1111"),
    ({"kind": "subsample", "levels": 0}, (2, 2), "00 00"),
    ({"kind": "subsample"}, (1, 1), "0"),
    ({"kind": "subsample"}, (5,), "03231"),
    ({"kind": "parallel_groups"}, (4, 4), "0414 5656 2434 5656"),
    ({"kind": "parallel_groups", "sequential_start": False}, (4, 4), "0101 2323 0101 2323"),
    ({"kind": "parallel_groups", "regions": (1, 2), "sequential_start": False}, (2, 4), "0101 2323"),
    ({"kind": "parallel_groups", "regions": 3}, (6,), "031323"),
    ({"kind": "coarse_to_fine"}, (2, 2), "02 12"),
    ({"kind": "coarse_to_fine"}, (2, 2, 2), "04 14 24 34"),
    ({"kind": "coarse_to_fine"}, (2, 3), "023 123"),
    ({"kind": "coarse_to_fine"}, (3,), "012"),
    ({"kind": "blocks"}, (2, 3), "000 111"),
    ({"kind": "blocks"}, (3,), "012"),
    ({"kind": "blocks"}, (2, 1, 2), "00 11"),
    ({"kind": "blocks", "block": 2}, (4, 4), "0011 0011 2233 2233"),
    ({"kind": "blocks", "block": (1, 2)}, (2, 4), "0011 2233"),
    ({"kind": "patches", "patch": 2}, (2, 4), "0145 2367"),
    ({"kind": "patches", "patch": 2, "flip": (1,)}, (2, 4), "4501 6723"),
    ({"kind": "patches", "patch": 2, "inside": {"kind": "column"}}, (4, 2), "02 13 46 57"),
    ({"kind": "patches", "patch": (1, 2), "over": {"kind": "nearest"}}, (2, 4), "0123 2345"),
    ({"kind": "patches", "patch": (1, 2, 1), "over": {"kind": "right_to_left"}}, (2, 2, 2), "20 31 64 75"),
]


@pytest.mark.parametrize(("options", "grid", "steps"), HAND, ids=str)
def test_steps_are_the_ones_written_by_hand(options: dict[str, Any], grid: tuple[int, ...], steps: str) -> None:
    """Steps of all cells in raster order, as digits to base 12."""
    order = make((grid,), **options)
    np.testing.assert_array_equal(order.step, [int(digit, 12) for digit in steps.replace(" ", "")])


def test_every_kind_has_steps_written_by_hand() -> None:
    assert {options["kind"] for options, _, _ in HAND} == set(ORDERS) - {"random", "next_scale", "locality", "one_of"}


def test_next_scale_takes_each_grid_of_a_pyramid_in_one_step() -> None:
    order = make(((1, 1), (2, 2), (3, 3)), kind="next_scale")
    np.testing.assert_array_equal(order.step, [0] + [1] * 4 + [2] * 9)
    finest = [[0, 0], [0, 1], [1, 0], [1, 1]]  # where a 2x2 grid's cells begin, in cells of the 3x3 grid
    np.testing.assert_array_equal(order.position[:5], [[0, 0, 0], *([1, *cell] for cell in finest)])
    np.testing.assert_array_equal(order.position[-1], [2, 2, 2])


def test_random_orders_differ_between_examples_and_keys_and_put_given_slots_first() -> None:
    order = make(((4, 4),), kind="random")
    slots = np.asarray(order.slots(jax.random.key(0), 6))
    assert len(np.unique(slots, axis=0)) == 6
    assert (slots != np.asarray(order.slots(jax.random.key(1), 6))).any()
    np.testing.assert_array_equal(slots, order.slots(jax.random.key(0), 6))
    first = np.asarray(jax.random.bernoulli(jax.random.key(2), 0.4, (6, 16)))
    led = np.asarray(order.slots(jax.random.key(0), 6, first))
    given = np.take_along_axis(first, led, axis=1)
    np.testing.assert_array_equal(given, -np.sort(-given.astype(int), axis=1))
    np.testing.assert_array_equal(np.sort(led, axis=1), np.tile(np.arange(16), (6, 1)))
    with pytest.raises(ValueError, match="needs a key"):
        order.slots(None, 6)


def test_a_locality_order_takes_what_is_near_the_known_and_far_from_its_own_step() -> None:
    """Every pick is among those that the paper's rules leave (arXiv:2507.01957, sec. 3.3), in 20 steps for 256 tokens."""
    order = make(((16, 16),), kind="locality", num_steps=20, repulsion=2.0)
    assert order.sizes == (1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20)  # as published
    slots = np.asarray(jax.jit(lambda key: order.slots(key, 2))(jax.random.key(0)))
    assert (slots[0] != slots[1]).any()
    apart = np.abs(order.position[:, None] - order.position[None])
    distance, axis = np.sqrt(np.square(apart).sum(axis=-1)), apart.max(axis=-1)
    inverse = np.where(axis == 1, 1 / np.maximum(distance, 1), 0)
    for own in slots:
        np.testing.assert_array_equal(np.sort(own), np.arange(256))
        for start, end in zip(np.cumsum((0, *order.sizes))[1:], np.cumsum(order.sizes)[1:], strict=False):
            beside = inverse[:, own[:start]].sum(axis=1)
            for rank in range(start, end):
                free, mine = np.setdiff1d(np.arange(256), own[:rank]), own[start:rank]
                gap = axis[np.ix_(free, mine)].min(axis=1, initial=99)
                near = free[(beside[free] > 0.999) & (gap > 2)]
                if len(near):
                    assert own[rank] in near and beside[own[rank]] > beside[near].max() - 1e-3
                elif len(mine):
                    least = distance[np.ix_(free, mine)].min(axis=1)
                    assert least[free == own[rank]] == least.max()


def test_one_of_several_orders_is_dealt_to_each_example() -> None:
    """All of them, equally often; given slots come first, and what is shuffled is shuffled."""
    orders = [{"kind": "raster"}, {"kind": "column"}, {"kind": "patches", "patch": 2, "over": {"kind": "random"}}]
    order = make(((4, 4),), kind="one_of", orders=orders)
    slots = np.asarray(order.slots(jax.random.key(0), 900))
    raster, column = (np.asarray(make(((4, 4),), **o).slots(None, 1)) for o in orders[:2])
    share = [(slots == fixed).all(axis=1).mean() for fixed in (raster, column)]
    np.testing.assert_allclose(share, 1 / 3, atol=0.06)  # four deviations
    patch = (order.position // 2) @ [2, 1]
    of_patches = slots[~(slots == raster).all(axis=1) & ~(slots == column).all(axis=1)]
    assert (np.ptp(patch[of_patches].reshape(-1, 4, 4), axis=2) == 0).all()
    assert len(np.unique(patch[of_patches][:, ::4], axis=0)) == 24
    first = jax.numpy.zeros((900, 16), bool).at[:, 5].set(True)
    led = np.asarray(order.slots(jax.random.key(0), 900, first))
    assert (led[:, 0] == 5).all() and (np.sort(led, axis=1) == np.arange(16)).all()


def test_a_locality_order_goes_on_from_what_is_given() -> None:
    order = make(((4, 4),), kind="locality", num_steps=6)
    first = np.zeros((1, 16), bool)
    first[0, [0, 1, 4]] = True
    slots = np.asarray(order.slots(jax.random.key(0), 1, jax.numpy.asarray(first)))[0]
    assert set(slots[:3]) == {0, 1, 4} and set(np.sort(slots)) == set(range(16))
    assert 5 in slots[3:6]  # of all cells the nearest to these three


def test_every_slot_is_equally_likely_to_come_first_in_a_random_order() -> None:
    first = np.asarray(make(((2, 2),), kind="random").slots(jax.random.key(0), 8000))[:, 0]
    np.testing.assert_allclose(np.bincount(first) / 8000, 0.25, atol=0.02)  # four deviations


def test_sizes_of_random_sets_are_the_ones_computed_by_hand() -> None:
    """16 cos(pi/8) = 14.8, 16 cos(pi/4) = 11.3, 16 cos(3 pi/8) = 6.1 are unknown after each step, rounded down."""
    np.testing.assert_array_equal(cosine_sizes(16, 4), [2, 3, 5, 6])
    np.testing.assert_array_equal(cosine_sizes(4, 4), [1, 1, 1, 1])  # no step may be empty
    np.testing.assert_array_equal(uniform_sizes(10, 4), [2, 3, 2, 3])
    np.testing.assert_array_equal(make(((3, 2),), kind="random", num_steps=2).step, [0, 0, 1, 1, 1, 1])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 70))
def test_random_sets_use_all_tokens_and_leave_no_step_empty(length: int, num_steps: int) -> None:
    num_steps = min(num_steps, length)
    for make_sizes in SIZES.values():
        sizes = make_sizes(length, num_steps)
        assert len(sizes) == num_steps and sizes.sum() == length and sizes.min() >= 1


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (((4, 4),), {"kind": "blocks", "block": 3}, "must divide"),
        (((4, 4),), {"kind": "blocks", "block": 0}, "must divide"),
        (((4, 4),), {"kind": "blocks", "block": (1, 2, 4)}, "2 numbers"),
        (((4, 4),), {"kind": "parallel_groups", "regions": 3}, "must divide"),
        (((4, 4),), {"kind": "nearest", "start": 4}, "outside"),
        (((4, 4),), {"kind": "nearest", "start": -1}, "outside"),
        (((4, 4),), {"kind": "subsample", "levels": 3}, "between 0 and 2"),
        (((4, 4),), {"kind": "random", "num_steps": 17}, "between 1 and"),
        (((4, 4),), {"kind": "random", "num_steps": 0}, "between 1 and"),
        (((4, 4),), {"kind": "random", "num_steps": 2, "sizes": "cosin"}, "cosin"),
        (((4, 4),), {"kind": "random", "sizes": (1, 2, 3)}, "whose sum is the number of tokens, 16"),
        (((4, 4),), {"kind": "patches", "patch": 3}, "must divide the grid"),
        (((4, 4),), {"kind": "patches", "patch": 2, "flip": (2,)}, "must name axes"),
        (((4, 4),), {"kind": "patches", "patch": 2, "inside": {"kind": "random"}}, "that is not shuffled"),
        (((4, 4),), {"kind": "patches", "patch": 2, "over": {"kind": "spyral"}}, "Did you mean 'spiral'"),
        (((4, 4),), {"kind": "one_of", "orders": ({"kind": "raster"}, {"kind": "nearest"})}, "take 16, 7 steps"),
        (((4, 4),), {"kind": "one_of", "orders": ()}, "take no steps"),
        (((4, 4),), {"kind": "next_scale"}, "several scales"),
        (((4, 4),), {"kind": "rastr"}, "Did you mean 'raster'"),
        (((4, 4),), {"kind": "spiral", "outwards": True}, "Did you mean 'outward'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(layout: Layout, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(layout, **options)


def test_an_order_with_an_empty_step_or_without_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="every step"):
        Order(np.asarray([0, 2]), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="every token a position"):
        Order(np.asarray([0, 1]), np.zeros((3, 1)))
