"""The axial transformer: it sees all of its past, and what lines tell is computed once a line."""

from __future__ import annotations

import functools
import math
from typing import Any

import cases
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.axial_transformer import AxialTransformer, Outer
from ar_jax.models.blocks import BlockOptions

DIM, WIDTH, LENGTH = 8, 3, 9


def model_of(width: int = WIDTH, outer_layers: int = 1, **fields: Any) -> AxialTransformer:
    make = functools.partial(MIXERS["softmax"], embed_dim=DIM, num_heads=2, rope_base=0.0)
    given = dict(mixers=(make,), options=BlockOptions(mlp_dim=8), num_rows=width**2, num_prefix=0, position_axes=1)
    return AxialTransformer(**{"embed_dim": DIM, "num_layers": 1, "outer_layers": outer_layers} | given | fields)


def tokens_of(length: int, first: int = 0) -> Tokens:
    step = first + jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(step, step[..., None], length)


# Rows of three; frames of 2 x 2 pixels of 2 channels. The last slices are not full.
SHAPES = [(3,), (2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_sees_all_of_its_past_and_nothing_else(shape: tuple[int, ...]) -> None:
    """No independence is assumed: with one outer layer of each level and one inner block already."""
    length = 2 * math.prod(shape) + shape[-1] + 1
    model, x = model_of(slice_shape=shape), jax.random.normal(jax.random.key(0), (1, length, DIM))
    params = jax.jit(lambda: model.init(jax.random.key(1), x, tokens_of(length)))()
    reads = jax.jit(jax.jacobian(lambda x: jnp.square(model.apply(params, x, tokens_of(length))[0])[0, :, 0]))(x)
    seen = np.abs(reads[:, 0]).max(axis=-1) > 1e-9
    np.testing.assert_array_equal(seen, np.tril(np.ones((length, length), bool)))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_tokens_one_by_one_are_those_of_the_whole_and_slices_are_told_when_they_are_full(
    shape: tuple[int, ...],
) -> None:
    """Each level's outer blocks run for a full slice alone: what they cost stands in as many branches as there are levels."""
    length = 2 * math.prod(shape) + 1
    model, x = model_of(slice_shape=shape), jax.random.normal(jax.random.key(0), (1, length, DIM))
    params = jax.jit(lambda: model.init(jax.random.key(1), x, tokens_of(length)))()
    whole = jax.jit(model.apply)(params, x, tokens_of(length))[0]
    one = jax.jit(lambda x, n, state: model.apply(params, x, tokens_of(1, n), None, state))
    state, outs = model.init_state(1, length, 1), []
    for n in range(length):
        out, state = one(x[:, n : n + 1], n, state)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=2e-5)  # float32, a few blocks
    jaxpr = jax.make_jaxpr(lambda x, state: model.apply(params, x, tokens_of(1), None, state))(x[:, :1], state)
    assert len(branches(jaxpr.jaxpr)) == len(shape)


def test_more_axes_cost_the_sum_of_their_lengths_and_not_the_length_of_a_frame() -> None:
    """Pixels of a frame read those of their row and of their column."""

    def cost(*shape: int) -> int:
        make = functools.partial(MIXERS["softmax"], embed_dim=DIM, num_heads=2, rope_base=0.0)
        outer = Outer(make, BlockOptions(mlp_dim=8), shape, 1)
        x = jax.ShapeDtypeStruct((1, 4, math.prod(shape), DIM), jnp.float32)
        place = jnp.zeros((1, 4, math.prod(shape), 1), jnp.int32)
        params = jax.eval_shape(lambda x: outer.init(jax.random.key(0), x, place, True), x)
        return flops(lambda params, x: outer.apply(params, x, place, True), params, x)

    assert cost(32, 32) < 0.2 * cost(1024)


def branches(jaxpr: Any) -> list[list[int]]:
    """FLOPs of the cases of every conditional, at any depth, one of whose cases costs nothing."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            costs = [flops(jax.extend.core.jaxpr_as_fun(case), *case.in_avals) for case in equation.params["branches"]]
            found += [] if min(costs) else [costs]
        for value in equation.params.values():
            found += branches(value.jaxpr) if hasattr(value, "jaxpr") else []
    return found


def test_a_step_runs_the_outer_layers_only_where_a_line_is_full() -> None:
    """What a step costs beside the branch of a full line is the same however many outer layers there are."""

    def costs(outer_layers: int) -> tuple[int, int]:
        model, x = model_of(outer_layers=outer_layers), jnp.zeros((1, 1, DIM))
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, tokens_of(1)))
        state = jax.eval_shape(lambda: model.init_state(1, LENGTH, 1))

        def step(params: Any, state: Any) -> Any:
            return model.apply(params, x, tokens_of(1), None, state)

        (cases_of_line,) = branches(jax.make_jaxpr(step)(params, state).jaxpr)
        return flops(step, params, state) - max(cases_of_line), max(cases_of_line)

    (token, line), (same, lines) = costs(1), costs(3)
    assert token == same and lines > 2.5 * line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__mixer=dict(kind="linear")), "needs one mixer that reads both ways inside a step"),
        (dict(model__adaln="block"), "takes a condition of one token and no adaLN"),
        (dict(model__slice_shape=(3, 1)), r"slice_shape=\(3, 1\), the last of it at least 2"),
    ],
)
def test_what_lines_do_not_have_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cases.tiny.__wrapped__(backbone="axial_transformer", **changes)
