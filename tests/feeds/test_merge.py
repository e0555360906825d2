"""Merge: what one evaluation of the network gives, and which orders have places of several codes, or blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError, build
from ar_jax.data.protocol import Facts
from ar_jax.feeds import FEEDS
from ar_jax.orders import ORDERS
from ar_jax.system import System, from_config

DEEP = dict(branch_layers=(1,), reads_answers=True)
FACTS = Facts("image", (1, 1, 1), 2, ("a", "b"))


def system(grid: tuple[int, ...], **changes: Any) -> System:
    """A decoder of six layers in all, on tokens of 8 values."""
    config: dict[str, Any] = {
        "tokenizer": dict(kind="codes", grids=(grid,), vocab_size=8),
        "order": dict(kind="raster"),
        "model": dict(embed_dim=32, num_layers=6, mixer=dict(kind="softmax", num_heads=4)),
    }
    config = {k: config.get(k, {}) | changes.get(k, {}) for k in {*config, *changes}}
    return from_config(config, FACTS)


def cost_of_a_sample(made: System) -> int:
    """FLOPs of the whole generation of one example."""
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    label, drop, drawing = jnp.zeros(1, jnp.int32), jnp.zeros(1, bool), made.drawing(guidance_scale=1.0)
    return flops(lambda p, k: made.sample(p, k, label, drop, drawing), shapes, jax.random.key(0))


def test_several_codes_of_a_place_are_drawn_in_one_pass_through_the_layers() -> None:
    """Three codes a place cost little more than one: each layer runs once for each place (arXiv:2410.01912, sec. 2.3)."""
    deep = system(
        (4, 4, 3),
        model=dict(num_layers=4, branch_layers=(1, 1), reads_answers=True, merge="sum"),
        feed=dict(kind="merge"),
        head=dict(kind="categorical", num_outputs=3),
    )
    assert len(deep.model.feed.chunks) == 16 and deep.model.step_sizes == (3,) * 16
    assert cost_of_a_sample(deep) < 1.1 * cost_of_a_sample(system((4, 4)))
    assert deep.model.generator.position[:4] == ((0, 0),) * 3 + ((0, 1),)


def test_a_window_of_tokens_is_one_token_in_the_layers() -> None:
    """Windows of 2 x 2: a quarter of the evaluations and of the cost, on the same grid (arXiv:2504.17789, sec. 3.2)."""
    shuffled = system(
        (4, 4),
        order=dict(kind="blocks", block=2),
        feed=dict(kind="merge"),
        model=dict(merge="shuffle", shuffle_blocks=1),
    )
    assert len(shuffled.model.feed.chunks) == 4 and shuffled.model.step_sizes == (4,) * 4
    state = shuffled.model.generator.decoder.init_state(1, shuffled.model.feed.max_len, 1)
    assert state[0][0].k.shape[2] == 4  # the class, and three windows
    assert cost_of_a_sample(shuffled) < 0.4 * cost_of_a_sample(system((4, 4)))  # two MLPs beside six layers


@pytest.mark.parametrize(
    ("order", "grid"),
    [
        (dict(kind="column"), (4, 2)),  # a place's codes are far apart
        (dict(kind="raster"), (4,)),  # the codes of one place are all there is
        (dict(kind="nearest"), (2, 2)),  # steps of several sizes
        (dict(kind="random"), (2, 2)),
    ],
)
def test_an_order_whose_tokens_do_not_stand_together_is_refused(order: dict[str, Any], grid: tuple[int, ...]) -> None:
    made = build(ORDERS, order, "order", layout=(grid,))
    with pytest.raises(UsageError, match="needs an order of one token a step in which the codes"):
        FEEDS["merge"](made, 1)


def test_a_block_has_its_place_on_the_grid_of_blocks() -> None:
    feed = FEEDS["merge"](build(ORDERS, dict(kind="blocks", block=(2, 3)), "order", layout=((4, 6),)), 1)
    assert [chunk.num_outputs for chunk in feed.chunks] == [6] * 4 and feed.chunks[0].cell_side == (2, 3)
    np.testing.assert_array_equal(feed.parallel().place, [-1, 0, 6, 12])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=dict(branch_layers=(1,), reads_answers=True)), "takes answers from 1 outputs .* gives 2"),
        (dict(feed=dict(kind="merge"), model=dict(branch_layers=(1,))), "set config.model.reads_answers=True"),
        (dict(head=dict(kind="categorical", num_outputs=2)), "num_outputs=2 must be the model's 1, or 1"),
        (
            dict(
                feed=dict(kind="merge"),
                model=DEEP,
                head=dict(kind="categorical", num_outputs=2, tied=True),
            ),
            "1 where tied=True",
        ),
        (dict(model=dict(merge="product")), "product"),
        (dict(model=dict(merge="shuffle")), "merge='shuffle' needs config.feed.kind='merge'"),
        (
            dict(order=dict(kind="blocks", block=(3, 1)), feed=dict(kind="merge"), model=dict(merge="shuffle")),
            "choose a multiple of 3",
        ),
        (dict(feed=dict(kind="merge"), model=DEEP, objective=dict(kind="permuted")), "does not go with feed 'merge'"),
        (dict(feed=dict(kind="merge"), model=DEEP, objective=dict(kind="next_token", num_answers=2)), "set it to 0"),
    ],
)
def test_parts_that_do_not_fit_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made = system((6, 2), **changes)
        jax.eval_shape(made.init, jax.random.key(0))
