"""Shift with learned tokens between single tokens and groups (PAR, S021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.data.protocol import Facts
from ar_jax.feeds import FEEDS
from ar_jax.feeds.protocol import NOWHERE
from ar_jax.interop.generators import greedy, logits_in_order
from ar_jax.interop.par import groups
from ar_jax.kernels.step_attention import visibility
from ar_jax.orders import ORDERS
from ar_jax.system import from_config


def feed_of(grid: tuple[int, int], regions: int):
    return FEEDS["shift"](ORDERS["parallel_groups"]((grid,), regions=regions), 1, transition=True)


@pytest.mark.parametrize(("regions", "evaluations"), [(2, 576 // 4 + 3), (4, 576 // 16 + 15)])
def test_n_regions_take_n_evaluations_alone_and_then_one_for_each_group(regions: int, evaluations: int) -> None:
    """24 x 24 codes in 147 evaluations by groups of 4, in 51 by groups of 16 (arXiv:2412.15119, table 2)."""
    made = feed_of((24, 24), regions)
    assert len(made.chunks) == evaluations and made.num_transition == regions**2 - 1
    assert len(list(made.runs())) == 2  # two programs: single tokens, and groups, the first of which is no other


def test_groups_read_all_of_themselves_and_of_what_came_before() -> None:
    """The class, four tokens alone, three learned ones beside the last of them, then groups of four."""
    whole = feed_of((4, 4), 2).parallel()
    np.testing.assert_array_equal(whole.source, [-2, 0, 1, 2, 3, -3, -4, -5, *range(4, 12)])
    assert (whole.place[5:8] == NOWHERE).all() and (whole.answers == np.arange(16)).all()
    group = np.concatenate([np.arange(4), np.repeat([4, 5, 6], 4)])
    steps = jnp.asarray(whole.step)[None]
    np.testing.assert_array_equal(visibility(steps, steps).dense()[0], group[None] <= group[:, None])


def test_a_group_is_drawn_as_it_is_trained() -> None:
    """The likeliest tokens of the sampling loop are those of the parallel form, given themselves."""
    model = dict(embed_dim=32, num_layers=2, mixer=dict(kind="softmax", num_heads=2, prefix_rotation="zero"))
    tokenizer = dict(kind="codes", grids=((4, 4),), vocab_size=9)
    system = from_config(dict(tokenizer=tokenizer, model=model) | groups(2), Facts("image", (1, 1, 1), 2, ("a", "b")))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), shapes)
    labels = jnp.asarray([0, 1])
    drawn = greedy(system, params, labels, 2)
    logits, target = logits_in_order(system, params, drawn, labels)
    np.testing.assert_array_equal(logits.argmax(axis=-1), target)
    assert len(np.unique(drawn)) > 3
