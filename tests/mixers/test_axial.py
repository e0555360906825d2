"""Axial attention: lines of a grid, and the Toeplitz sums along them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

GRID = (3, 4)


def tokens_of(step: jax.Array | None = None) -> Tokens:
    """All places of the grid, all in one step or one by one."""
    place = jnp.asarray(np.indices(GRID).reshape(2, -1).T[None], jnp.int32)
    return Tokens(jnp.zeros((1, 12), jnp.int32) if step is None else step, place, 12)


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (1, 12, 8))


@pytest.mark.parametrize("kind", ["axial", "axial, one after the other", "toeplitz"])
def test_tokens_that_gather_their_lines_give_what_the_grid_gives(kind: str) -> None:
    fields = {"sum_axes": False} if "," in kind else {}
    mixer = MIXERS[kind.partition(",")[0]](embed_dim=8, num_heads=2, grid=GRID, **fields)
    params = mixer.init(jax.random.key(1), inputs(), tokens_of())
    found = mixer.apply(params, inputs(), tokens_of())[0]
    whole = mixer.apply(params, inputs().reshape(1, *GRID, 8), method="on_grid")
    np.testing.assert_allclose(found, whole.reshape(1, 12, 8), atol=1e-5)  # float32, sums of a few terms


def test_a_token_reads_its_row_and_its_column_as_far_as_they_have_come() -> None:
    mixer = MIXERS["axial"](embed_dim=8, num_heads=2, grid=GRID)
    tokens = tokens_of(jnp.arange(12, dtype=jnp.int32)[None])
    params = mixer.init(jax.random.key(1), inputs(), tokens)
    reads = jax.jacobian(lambda x: jnp.square(mixer.apply(params, x, tokens)[0]).sum(axis=(0, 2)))(inputs())[:, 0]
    row, column = np.divmod(np.arange(12), 4)
    lines = (row[:, None] == row[None]) | (column[:, None] == column[None])
    np.testing.assert_array_equal(np.abs(reads).max(axis=-1) > 1e-7, lines & np.tri(12, dtype=bool))


def test_toeplitz_sums_fade_along_each_axis() -> None:
    mixer = MIXERS["toeplitz"](embed_dim=1, num_heads=1, grid=GRID)
    tokens, x = tokens_of(), jnp.zeros((1, 12, 1)).at[0, 0].set(1.0)  # a one in the corner
    params = mixer.init(jax.random.key(1), x, tokens)["params"]
    eye = {"kernel": jnp.eye(1)}
    params |= {"decay": jnp.zeros((2, 1)), "amount": jnp.full((2, 1), 1e-6), "out_0": eye, "out_1": eye}  # r = 1/2
    found = mixer.apply({"params": params}, x, tokens)[0].reshape(GRID) * 1e-3 / 1e-6  # the norm's epsilon is 1e-6
    np.testing.assert_allclose(found[:, 0], [2, 0.5, 0.25], atol=1e-4)  # what it divides by is 1e-3 (1 + 1e-6)
    np.testing.assert_allclose(found[0, 1:], [0.5, 0.25, 0.125], atol=1e-4)
    assert not np.asarray(found[1:, 1:]).any()


@pytest.mark.parametrize("kind", ["axial", "toeplitz"])
def test_without_a_grid_there_are_no_lines(kind: str) -> None:
    with pytest.raises(UsageError, match=f"The mixer '{kind}' .* give tokens with places"):
        MIXERS[kind](embed_dim=8).init_state(1, 4, 1)
