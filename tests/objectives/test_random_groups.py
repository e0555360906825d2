"""Groups of drawn sizes (LPD): the same as a model of these groups, and what is asked for together is known to all who ask."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from ar_jax.config import UsageError, get_config
from ar_jax.feeds.query import grouped_chunk
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.system import System, from_config

SIZES = (1, 3, 5)
PEERS = "softmax, queries that see each other"


def system_of(mixer: str = PEERS, **changes) -> System:
    return cases.tiny(mixer, "random", "query", order__sizes=SIZES, **changes)


def test_groups_that_are_data_are_read_like_those_of_the_order() -> None:
    system = system_of()
    model, params, values = system.model, cases.tiny_params(system), cases.tokens(system, 2)
    context = model.context(jax.random.key(1), 2, jnp.asarray([0, 2]))
    steps = jnp.broadcast_to(jnp.repeat(jnp.arange(3), np.asarray(SIZES), total_repeat_length=9)[None], (2, 9))
    chunks = (model.feed.parallel(), grouped_chunk(model.num_prefix, steps))
    (hidden, target), (again, same) = (teacher_forced(model, chunk, params, values, context) for chunk in chunks)
    np.testing.assert_array_equal(target, same)
    np.testing.assert_allclose(again, hidden, atol=1e-5)  # float32


@pytest.mark.parametrize(("mixer", "sees"), [(PEERS, True), ("softmax", False)])
def test_a_query_knows_what_is_asked_together_with_it_and_nothing_of_other_groups(mixer: str, sees: bool) -> None:
    """In two examples the second group asks for the same first slot, but for another last one."""
    system = system_of(mixer)
    model, params = system.model, cases.tiny_params(system)
    slots = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    slots[1, [3, 8]] = [8, 3]
    context = model.context(jax.random.key(1), 2, jnp.asarray([1, 1]))
    context = dataclasses.replace(context, slots=jnp.asarray(slots))
    chunk = model.feed.chunks[1]  # feeds the first token, and three queries
    hidden, _ = model.read(params, jnp.zeros((2, 9), jnp.int32), context, chunk)
    moved = np.abs(np.asarray(hidden[0] - hidden[1])).max(axis=-1)[np.asarray(chunk.asked)]
    assert ((moved[:2] > 1e-4) == sees).all() and moved[2] > 1e-4


def test_the_published_models_take_20_and_48_network_evaluations() -> None:
    for variant, steps in (("l", 20), ("xxl", 20), ("xl_512", 48)):
        config = get_config(Path(__file__).parents[2] / f"configs/lpd.py:{variant}")
        system = from_config(config, published.facts_of(config))
        assert len(system.sampler.feed.chunks) == steps and system.sampler.order.length in (256, 1024)
        assert {sum(row) for row in config.objective.sizes} == {system.model.order.length}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective=dict(kind="random_groups", sizes=((4, 4),))), "whose sum is 8"),
        (dict(objective=dict(kind="random_groups", sizes=())), "needs rows of sizes"),
        (dict(objective=dict(kind="random_groups", sizes=((4, 5),)), feed__kind="shift"), "config.feed.kind='query'"),
    ],
)
def test_sizes_and_feeds_that_do_not_fit_are_told(changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        cases.tiny.__wrapped__("softmax", "random", changes.get("feed__kind", "query"), objective=changes["objective"])
