"""Feeds: who is fed when, so that nothing leaks and nothing known is hidden, by construction."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError, build
from ar_jax.feeds import FEEDS
from ar_jax.feeds.mask import masked_chunk
from ar_jax.feeds.protocol import BLANK, NOWHERE, Chunk, Feed, prefix_source
from ar_jax.feeds.resize import follows_first_axis
from ar_jax.orders import ORDERS
from ar_jax.orders.protocol import Order

LAYOUTS = {"image": ((3, 3),), "pyramid": ((1, 1), (2, 2), (3, 3))}
PREFIXES = (1, 3)
GROWING = ("nearest", "diagonal, parallel")  # from one cell to those beside it


def order_of(name: str) -> Order:
    layout = LAYOUTS["pyramid" if name == "next_scale" else "image"]
    return build(ORDERS, cases.ORDERS[name], "order", layout=layout)


def takes(feed: str, order: str) -> bool:
    """Whether a feed takes an order."""
    if feed == "neighbors":
        return order in GROWING
    if feed == "merge":
        return order == "blocks"
    if feed == "refine":  # of two codes a place; see test_refine.py
        return False
    if feed == "recent":  # it takes all alike
        return order in ("raster", "random, in sets", "next_scale")
    if feed == "nearby":  # what is far, and so dropped, is in tests/feeds/test_nearby.py
        return order in ("patches", "random, in sets", "nearest")
    return feed != "resize" or follows_first_axis(order_of(order))


def rows() -> list[tuple[str, str, int]]:
    """Every feed that takes an order, with short and long prefixes."""
    fits = [(f, o) for f in FEEDS for o in cases.ORDERS if takes(f, o)]
    return [(feed, order, prefix) for feed, order in fits for prefix in PREFIXES]


def setting(feed: str, order: str, num_prefix: int) -> tuple[Feed, Order, np.ndarray]:
    """The feed, its order, and the step of each rank."""
    made = order_of(order)
    return FEEDS[feed](made, num_prefix), made, np.sort(made.step)


every_feed = pytest.mark.parametrize(("feed", "order", "num_prefix"), rows())


@every_feed
def test_every_step_asks_for_its_own_tokens_once(feed: str, order: str, num_prefix: int) -> None:
    made, _, step = setting(feed, order, num_prefix)
    assert len(made.chunks) == step.max() + 1
    for k, chunk in enumerate(made.chunks):
        answered = np.sort(chunk.answers[chunk.answers >= 0])
        np.testing.assert_array_equal(answered, np.flatnonzero(step == k))
        assert (chunk.target[chunk.target < 0] == NOWHERE).all()


@every_feed
def test_what_is_fed_in_a_step_comes_from_earlier_steps(feed: str, order: str, num_prefix: int) -> None:
    """So no answer can know its own token; `step` says the same to the parallel form, where all steps are fed at once."""
    made, _, step = setting(feed, order, num_prefix)
    for k, chunk in enumerate(made.chunks):
        values = chunk.source[chunk.source >= 0]
        assert (step[values] < k).all()
        if made.remembers:
            assert (chunk.step[chunk.asked[chunk.asked >= 0]] == k).all()
            assert (chunk.step[chunk.source >= 0] == k).all() and (chunk.step <= k).all()
            np.testing.assert_array_equal(np.sort(chunk.step), chunk.step)  # a prefix is read from its start to its end
    if made.remembers:
        whole = made.parallel()
        fed = whole.source >= 0
        assert (step[whole.source[fed]] < whole.step[fed]).all()
        for answer, asked in zip(whole.answers, whole.asked.reshape(len(whole.answers), -1), strict=True):
            assert (whole.step[asked[asked >= 0]] == step[answer]).all()


@every_feed
def test_all_that_is_known_is_fed(feed: str, order: str, num_prefix: int) -> None:
    """What was generated before step k and the prefix: remembered from former steps, or fed in this one."""
    made, _, step = setting(feed, order, num_prefix)
    known: set[int] = set()
    for k, chunk in enumerate(made.chunks):
        kept = chunk.source[: chunk.num_remembered]
        if chunk.members is not None:  # several are fed as one
            kept = np.concatenate([kept[kept < 0], chunk.members[: chunk.num_remembered][kept >= 0].reshape(-1)])
        known = (known if made.remembers else set()) | {int(s) for s in kept if s != BLANK}
        prefix = {prefix_source(p) for p in range(num_prefix)}
        assert known == prefix | set(np.flatnonzero(step < k).tolist())
        assert (chunk.source[chunk.num_remembered :] == BLANK).all()  # what is forgotten carried nothing


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("feed", ["query", "mask"])
def test_what_is_told_is_fed_before_the_first_answer_and_never_asked_for(feed: str, adaptive: bool) -> None:
    options = dict(kind="random", num_steps=3, sizes="uniform", adaptive=adaptive, num_told=4)
    order = build(ORDERS, options, "order", layout=LAYOUTS["image"])
    made = FEEDS[feed](order, 2)
    assert order.sizes == (4, 1, 2, 2) and len(made.chunks) == 3
    known: set[int] = set()
    for chunk, start in zip(made.chunks, (4, 5, 7), strict=True):
        assert chunk.answers[chunk.answers >= 0].min() == start
        known = (known if made.remembers else set()) | {int(s) for s in chunk.source if s != BLANK}
        assert known == {prefix_source(0), prefix_source(1), *range(start)}
    assert made.max_len == (2 + 7 if made.remembers else 0)


@every_feed
def test_values_stand_at_their_own_place_or_where_they_are_asked(feed: str, order: str, num_prefix: int) -> None:
    made, _, _ = setting(feed, order, num_prefix)
    for chunk in made.chunks:
        value, asked = chunk.source >= 0, chunk.target >= 0
        own = chunk.place == chunk.source
        answer = asked & (chunk.place == chunk.target)
        assert (own | answer)[value].all()
        assert answer[chunk.source == BLANK].all() or not made.remembers
        np.testing.assert_array_equal(chunk.place[(chunk.source < BLANK) & ~asked], NOWHERE)


@every_feed
def test_runs_one_behind_the_other_are_the_chunks(feed: str, order: str, num_prefix: int) -> None:
    made, _, _ = setting(feed, order, num_prefix)
    walked: list[Chunk] = []
    for first, run in made.runs():
        assert first == len(walked)
        if made.remembers:  # what the state holds after the run
            ends = np.cumsum([chunk.num_remembered for chunk in made.chunks])
            assert run.num_readable == min(ends[first + len(run.target) - 1], made.max_len)
        run = run.replace(num_readable=None)
        for target, asked in zip(run.target, run.asked, strict=True):  # all that has a target answers, once
            np.testing.assert_array_equal(np.sort(asked[target[asked] >= 0]), np.flatnonzero(target >= 0))
        walked += [jax.tree.map(lambda a, i=i: a[i], run) for i in range(len(run.target))]
    assert len(walked) == len(made.chunks)
    for one, other in zip(walked, made.chunks, strict=True):
        assert one.num_remembered == other.num_remembered
        jax.tree.map(np.testing.assert_array_equal, one, other)


@every_feed
def test_the_parallel_form_feeds_the_same_tokens_with_the_remembered_ones_first(
    feed: str, order: str, num_prefix: int
) -> None:
    made, _, _ = setting(feed, order, num_prefix)
    if not made.remembers:
        assert made.max_len == made.max_step_len == 0
    if not made.has_parallel:
        with pytest.raises(UsageError, match="no parallel form"):
            made.parallel()
        return
    whole = made.parallel()

    def rows_of(chunk: Chunk, kept: bool) -> list[tuple[Any, ...]]:
        piece = slice(0, chunk.num_remembered) if kept else slice(chunk.num_remembered, None)
        arrays = (chunk.source, chunk.place, chunk.target, chunk.step)
        return list(zip(*(np.asarray(a)[piece].tolist() for a in arrays), strict=True))

    for kept in (True, False):  # in the order of the steps, as a mixer's state sees them
        assert rows_of(whole, kept) == [row for chunk in made.chunks for row in rows_of(chunk, kept)]
    if made.apart:  # each step is a segment, and leaves nothing
        lengths = [len(chunk) for chunk in made.chunks]
        np.testing.assert_array_equal(np.bincount(whole.segment), lengths)
        return
    assert made.max_len == whole.num_remembered or feed == "nearby"
    assert made.max_step_len == max(chunk.num_remembered for chunk in made.chunks)


@pytest.mark.parametrize(
    ("order", "like"),
    [
        ("raster", "shift"),
        ("random", "shift"),
        ("nearest, one by one", "shift"),
        ("nearest", "query"),
        ("diagonal, parallel", "query"),
        ("subsample", "query"),
        ("parallel_groups", "query"),
        ("random, in sets", "query"),
        ("blocks", "resize"),
        ("next_scale", "resize"),
    ],
)
def test_auto_chooses_the_feed_that_serves_the_order(order: str, like: str) -> None:
    made = order_of(order)
    jax.tree.map(np.testing.assert_array_equal, FEEDS["auto"](made, 1).chunks, FEEDS[like](made, 1).chunks)


P = prefix_source(0)
HAND: dict[tuple[str, str], list[tuple[list[int], list[int], list[int]]]] = {
    # source, place, target of each step; sizes 1, 2, 1 (a 2x2 grid's diagonals) or 1, 4 (a pyramid)
    ("shift", "diagonal"): [([P], [-1], [0]), ([0, 0], [0, 0], [1, 2]), ([1, 2], [1, 2], [3, -1])],
    ("query", "diagonal"): [
        ([P, -1], [-1, 0], [-1, 0]),
        ([0, -1, -1], [0, 1, 2], [-1, 1, 2]),
        ([1, 2, -1], [1, 2, 3], [-1, -1, 3]),
    ],
    ("mask", "diagonal"): [
        ([P, -1, -1, -1, -1], [-1, 0, 1, 2, 3], [-1, 0, -1, -1, -1]),
        ([P, 0, -1, -1, -1], [-1, 0, 1, 2, 3], [-1, -1, 1, 2, -1]),
        ([P, 0, 1, 2, -1], [-1, 0, 1, 2, 3], [-1, -1, -1, -1, 3]),
    ],
    ("recent", "diagonal"): [
        ([P, -1], [-1, 0], [-1, 0]),
        ([P, 0, -1, -1], [-1, 0, 1, 2], [-1, -1, 1, 2]),
        ([P, 0, 1, 2, -1], [-1, 0, 1, 2, 3], [-1, -1, -1, -1, 3]),
    ],
    ("neighbors", "nearest"): [
        ([P], [-1], [-1]),
        ([0], [0], [-1]),
        ([1, 2], [1, 2], [-1, -1]),
    ],
    ("resize", "next_scale"): [([P], [-1], [0]), ([0] * 4, [1, 2, 3, 4], [1, 2, 3, 4])],
    ("resize", "blocks"): [([P, P], [0, 1], [0, 1]), ([0, 1], [2, 3], [2, 3])],
}


@pytest.mark.parametrize(("feed", "order"), HAND)
def test_chunks_are_the_ones_written_by_hand(feed: str, order: str) -> None:
    layout = ((1, 1), (2, 2)) if order == "next_scale" else ((2, 2),)
    options = {"kind": order, "parallel": True} if order == "diagonal" else {"kind": order}
    made = FEEDS[feed](build(ORDERS, options, "order", layout=layout), 1)
    found = [tuple(np.asarray(a).tolist() for a in (c.source, c.place, c.target)) for c in made.chunks]
    assert found == HAND[feed, order]


def test_resize_feeds_each_cell_the_coarse_cell_that_covers_it() -> None:
    """A 2x2 grid over 3x3 cells: coarse cells begin at 0 and 1, so the finer rows 0, 1, 2 read the coarse rows 0, 1, 1."""
    made = FEEDS["resize"](order_of("next_scale"), 1)
    coarse = np.asarray([[1, 2], [3, 4]])  # ranks behind the single cell of the first grid
    rows = np.asarray([0, 1, 1])
    np.testing.assert_array_equal(made.chunks[2].source, coarse[rows][:, rows].reshape(-1))


def test_resize_refuses_orders_whose_steps_are_no_scales_or_rows() -> None:
    for order in ("raster", "random, in sets", "nearest"):
        with pytest.raises(UsageError, match="use feed 'query'"):
            FEEDS["resize"](order_of(order), 1)


@pytest.mark.parametrize(
    ("grid", "start", "directions"),
    [((3, 3), 0, 2), ((4, 3), (3, 0), 2), ((3, 3), 1, 4), ((2, 3, 4), 0, 3), ((2, 3, 4), (0, 1, 0), 4), ((5,), 0, 1)],
)
def test_each_cell_is_answered_by_all_cells_of_the_step_before_that_touch_it(grid: Any, start: Any, directions: int):
    """Each by its output of that direction; from a corner of an n x n image in 2n - 1 steps, in a video likewise."""
    order = build(ORDERS, dict(kind="nearest", start=start), "order", layout=(grid,))
    made = FEEDS["neighbors"](order, 1)
    assert made.num_outputs == directions
    if not np.any(start):
        assert len(made.chunks) == sum(grid) - len(grid) + 1
    cells = order.position[np.argsort(order.step, kind="stable")]
    ways: dict[int, set[tuple[int, ...]]] = {}
    for chunk in made.chunks[1:]:
        for answer, asked in zip(chunk.answers, chunk.asked, strict=True):
            touching = np.flatnonzero(np.abs(cells[chunk.source] - cells[answer]).sum(axis=1) == 1)
            assert sorted(asked[asked >= 0]) == touching.tolist()
            for output in np.flatnonzero(asked >= 0):
                step = tuple((cells[answer] - cells[chunk.source[asked[output]]]).tolist())
                ways.setdefault(int(output), set()).add(step)
    assert sorted(ways) == list(range(directions)) and all(len(steps) == 1 for steps in ways.values())


def test_neighbors_refuses_orders_that_do_not_grow_from_cell_to_cell() -> None:
    for order in ("raster", "random, in sets", "blocks", "parallel_groups"):
        with pytest.raises(UsageError, match="use feed 'query'"):
            FEEDS["neighbors"](order_of(order), 1)


def test_a_feed_and_a_model_of_another_number_of_outputs_are_told() -> None:
    with pytest.raises(UsageError, match=r"2 outputs of each token, but the model gives 1; set .*branch_layers=\(1,\)"):
        cases.tiny(order="nearest", feed="neighbors")


def test_a_masked_chunk_feeds_what_is_known_of_each_example() -> None:
    chunk = masked_chunk(4, 2, jnp.asarray([0, 1, 4]))
    prefix = [prefix_source(0), prefix_source(1)]
    known = [prefix + row for row in ([-1, -1, -1, -1], [0, -1, -1, -1], [0, 1, 2, 3])]
    np.testing.assert_array_equal(chunk.source, known)
    np.testing.assert_array_equal(chunk.place, [-1, -1, 0, 1, 2, 3])
    unknown = [[-1, -1, *row] for row in ([0, 1, 2, 3], [-1, 1, 2, 3], [-1, -1, -1, -1])]
    np.testing.assert_array_equal(chunk.target, unknown)
    assert chunk.num_remembered == 6 and not np.asarray(chunk.step).any()
