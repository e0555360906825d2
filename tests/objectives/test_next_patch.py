"""Next patch (NPP): patches of tokens at first, and at the end nothing but next tokens."""

from __future__ import annotations

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.objectives.next_patch import patch_chunk, patches
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.system import System


def system_of(sides: tuple[int, ...] = (4, 2, 1), **objective) -> System:
    told = dict(kind="next_patch", sides=sides) | objective
    return cases.tiny.__wrapped__(side=4, objective=told, condition__guidance_dropout_rate=0.0)


def test_patches_shrink_stage_by_stage_and_nothing_is_added_to_the_network() -> None:
    """A quarter of the training on patches of 4 x 4, a quarter on 2 x 2, half of it on tokens; the last is next token."""
    system, plain = system_of(), cases.tiny.__wrapped__(side=4, condition__guidance_dropout_rate=0.0)
    params = cases.tiny_params(system)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, cases.tiny_params(plain))
    batch = {"tokens": cases.tokens(system, 2), "label": jnp.asarray([0, 1])}
    loss = jax.jit(lambda progress: system.loss(params, batch, jax.random.key(0), progress)[:2])
    found = [loss(jnp.float32(p)) for p in (0, 0.24, 0.26, 0.49, 0.51, 0.99)]
    assert [float(metrics["patch_side"]) for _, metrics in found] == [4, 4, 2, 2, 1, 1]
    expected = plain.loss(params, batch, jax.random.key(0), jnp.float32(0))[0]
    np.testing.assert_allclose(found[-1][0], expected, atol=1e-5)  # float32
    assert len({float(nats) for nats, _ in found}) == 3


def test_a_patch_is_the_mean_of_its_tokens_on_a_grid_of_its_own() -> None:
    fed, members = patch_chunk(system_of().model.order, 1, 2)
    np.testing.assert_array_equal(members, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    assert fed.source.tolist() == [-2, 0, 2, 8] and fed.target.tolist() == [0, 2, 8, 10] and fed.cell_side == 2
    system = system_of()
    params, context = cases.tiny_params(system), system.model.context(None, 1, jnp.zeros(1, jnp.int32))
    values = cases.tokens(system, 1)
    mixed = values.at[:, jnp.asarray([0, 1, 4, 5])].set(values[:, jnp.asarray([5, 0, 1, 4])])
    hidden, target = patches(system.model, 2, params, values, context)
    again, _ = patches(system.model, 2, params, mixed, context)
    np.testing.assert_array_equal(target[0], np.asarray(values)[0][members])
    np.testing.assert_allclose(again, hidden, atol=1e-5)  # their order in the patch does not matter
    apart, _ = patches(system.model, 2, params, values.at[:, 5].add(1) % 3, context)
    moved = np.abs(np.asarray(apart - hidden)).max(axis=-1)[0] > 1e-4
    assert moved.tolist() == [False, True, True, True]


def test_patches_of_one_token_are_the_tokens() -> None:
    model = system_of().model
    params, context = cases.tiny_params(system_of()), model.context(None, 2, jnp.asarray([0, 1]))
    values = cases.tokens(system_of(), 2)
    one, target = patches(model, 1, params, values, context)
    expected, same = teacher_forced(model, model.feed.parallel(), params, values, context)
    np.testing.assert_allclose(one, expected, atol=1e-5)  # float32
    np.testing.assert_array_equal(target[..., 0], same)


@pytest.mark.parametrize(
    ("sides", "order", "message"),
    [
        ((2,), "raster", "must end with 1"),
        ((3, 1), "raster", "must divide the grid"),
        ((2, 1), "spiral", "needs order 'raster'"),
    ],
)
def test_patches_that_do_not_fit_are_told(sides, order, message) -> None:
    with pytest.raises(UsageError, match=message):
        cases.tiny.__wrapped__("softmax", order, side=4, objective=dict(kind="next_patch", sides=sides))
