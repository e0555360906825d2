"""The axial transformer: it sees all of its past, and what lines tell is computed once a line."""

from __future__ import annotations

import functools
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
from ar_jax.models.axial_transformer import AxialTransformer
from ar_jax.models.blocks import BlockOptions

DIM, WIDTH, LENGTH = 8, 3, 9


def model_of(width: int = WIDTH, outer_layers: int = 1, **fields: Any) -> AxialTransformer:
    make = functools.partial(MIXERS["softmax"], embed_dim=DIM, num_heads=2, rope_base=0.0)
    given = dict(mixers=(make,), options=BlockOptions(mlp_dim=8), num_rows=width**2, num_prefix=0, position_axes=1)
    return AxialTransformer(**{"embed_dim": DIM, "num_layers": 1, "outer_layers": outer_layers} | given | fields)


def tokens_of(length: int, first: int = 0) -> Tokens:
    step = first + jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(step, step[..., None], length)


def test_a_token_sees_all_of_its_past_and_nothing_else() -> None:
    """No independence is assumed: with one outer pair and one inner block already."""
    model, x = model_of(), jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
    params = model.init(jax.random.key(1), x, tokens_of(LENGTH))
    reads = jax.jit(jax.jacobian(lambda x: jnp.square(model.apply(params, x, tokens_of(LENGTH))[0])[0, :, 0]))(x)
    seen = np.abs(reads[:, 0]).max(axis=-1) > 1e-9
    np.testing.assert_array_equal(seen, np.tril(np.ones((LENGTH, LENGTH), bool)))


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
        (dict(model__line_length=1), "line_length=1 at least 2"),
    ],
)
def test_what_lines_do_not_have_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cases.tiny.__wrapped__(backbone="axial_transformer", **changes)
