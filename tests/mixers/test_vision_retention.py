"""Vision retention: its quadrant by the equation, and one function in its recurrent, chunkwise and parallel forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.kernels.grid_retention import grid_retention
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

WIDTH, ROWS, HEADS = 4, 3, 2
LENGTH = WIDTH * ROWS - 1  # the last row is not full
LOG_DECAY = np.float32(np.log([[0.9, 0.5], [0.7, 0.8]]))  # of rows, of columns


def arrays() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    q, k = np.float32(rng.normal(size=(2, 2, LENGTH, HEADS, 3)))
    return q, k, np.float32(rng.normal(size=(2, LENGTH, HEADS, 5)))


def by_the_recurrence(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S_xy = a S_{x-1,y} + b S_{x,y-1} - a b S_{x-1,y-1} + k v^T, place by place."""
    out, (a, b) = np.zeros(v.shape), np.exp(LOG_DECAY)[:, None, :, None, None]
    state = np.zeros((ROWS + 1, WIDTH + 1, len(q), HEADS, 3, 5))
    for t in range(LENGTH):
        x, y = t // WIDTH, t % WIDTH
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        state[x + 1, y + 1] = a * state[x, y + 1] + b * state[x + 1, y] - a * b * state[x, y] + kv
        out[:, t] = np.einsum("bnh,bnhe->bne", q[:, t], state[x + 1, y + 1])
    return out


@pytest.mark.parametrize("chunk_size", [1, 3, None, 100], ids=["recurrent", "across rows", "row by row", "parallel"])
def test_every_form_is_the_recurrence_in_two_dimensions(chunk_size: int | None) -> None:
    q, k, v = arrays()
    index = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], (2, LENGTH))
    found, columns = jax.jit(grid_retention, static_argnames=("width", "chunk_size"))(
        q, k, v, index, LOG_DECAY, width=WIDTH, chunk_size=chunk_size
    )
    np.testing.assert_allclose(found, by_the_recurrence(q, k, v), atol=1e-5)  # float32, sums of a dozen terms
    np.testing.assert_array_equal(columns.row, [ROWS - 1] * 2)


def test_a_token_reads_no_later_column_and_the_prefix_is_read_by_all() -> None:
    mixer = MIXERS["vision_retention"](embed_dim=4, num_heads=1, grid=(2, 3), num_prefix=1)
    index = jnp.arange(7, dtype=jnp.int32)[None]
    tokens, x = Tokens(index, jnp.zeros((1, 7, 2), jnp.int32), 7), jax.random.normal(jax.random.key(0), (1, 7, 4))
    params = mixer.init(jax.random.key(1), x, tokens)
    reads = jax.jacobian(lambda x: jnp.square(mixer.apply(params, x, tokens)[0]).sum(axis=(0, 2)))(x)[:, 0]
    seen = np.abs(reads).max(axis=-1) > 1e-6
    quadrant = np.asarray(
        [[r <= row and c <= col for r in range(2) for c in range(3)] for row in range(2) for col in range(3)]
    )
    np.testing.assert_array_equal(seen[1:, 1:], quadrant)
    assert seen[:, 0].all() and not seen[0, 1:].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=3), "does not divide embed_dim=8"),
        (dict(dimensions=3), "dimensions=3 must be 1 or 2"),
        (dict(), "line_length=0 must be at least 1 without a grid"),
    ],
)
def test_wrong_options_are_told(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MIXERS["vision_retention"](embed_dim=8, **fields).init_state(1, 4, 1)
