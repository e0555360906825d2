"""TTT-linear: the layer is its equation, and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

LENGTH, DIM, WIDTH, SIZE = 5, 6, 4, 2


def tokens_of(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def standard(x: Any) -> Any:
    return (x - x.mean()) / jnp.sqrt(jnp.square(x - x.mean()).mean() + 1e-6)


def test_the_layer_is_its_equation() -> None:
    """One head, mini-batches of two: gradients by jax.grad of the inner loss, rates and rotations as published."""
    mixer = MIXERS["ttt"](embed_dim=DIM, num_heads=1, head_dim=WIDTH, mini_batch=SIZE)
    x = np.random.default_rng(0).normal(size=(1, LENGTH, DIM)).astype(np.float32)
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), x, tokens_of(LENGTH)))
    leaves, tree = jax.tree.flatten(shapes)
    draw = np.random.default_rng(1)
    variables = jax.tree.unflatten(tree, [0.5 * draw.normal(size=a.shape).astype(np.float32) for a in leaves])
    p = variables["params"]
    q, k, v = (x[0] @ p[name]["kernel"] for name in ("query", "key", "value"))
    turn = np.exp(1j * np.outer(np.arange(LENGTH) % SIZE, 10000.0 ** -np.asarray([0, 0.5])))

    def turned(a: np.ndarray) -> np.ndarray:
        pairs = (a[:, : WIDTH // 2] + 1j * a[:, WIDTH // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=-1).astype(np.float32)

    q, k = turned(q), turned(k)
    rate = 1 / (1 + np.exp(-(x[0] @ p["rate"]["kernel"] + p["rate"]["bias"])))[:, 0] / WIDTH
    mean = np.maximum(1 / np.arange(1, SIZE + 1) + p["mean_offset"], 0)

    def loss(weights: Any, t: int) -> jax.Array:
        key, value = jnp.asarray(k)[t], jnp.asarray(v)[t]
        guess = p["inner_scale"][0] * standard(key @ weights[0] + weights[1]) + p["inner_offset"][0]
        return jnp.square(guess - (value - key)).sum() / 2

    slope = jax.jit(jax.grad(loss))
    begun, right = (p["weight"][0], p["bias"][0]), []
    for first in range(0, LENGTH, SIZE):
        total = jax.tree.map(jnp.zeros_like, begun)
        for t in range(first, min(first + SIZE, LENGTH)):
            total = jax.tree.map(lambda a, g, t=t: a + rate[t] * g, total, slope(begun, t))
            now = jax.tree.map(lambda w, g, t=t: w - mean[t % SIZE] * g, begun, total)
            right.append(q[t] + p["inner_scale"][0] * standard(q[t] @ now[0] + now[1]) + p["inner_offset"][0])
        begun = now
    right = np.stack([standard(o) * p["norm"]["scale"] + p["norm"]["bias"] for o in right])
    right = (right * jax.nn.gelu(x[0] @ p["opening"]["kernel"])) @ p["out"]["kernel"]
    found = jax.jit(lambda variables: mixer.apply(variables, x, tokens_of(LENGTH))[0])(variables)
    np.testing.assert_allclose(found[0], right, atol=5e-5)  # float32, some ten products behind norms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=4), "num_heads=4 does not divide embed_dim=6"),
        (dict(num_heads=2), "head_dim=3 must be even to be turned"),
        (dict(num_heads=1, mini_batch=0), "mini_batch=0 must be at least 1"),
        (dict(num_heads=1, residual="key"), "model.mixer.residual='key' is unknown"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    mixer = MIXERS["ttt"](embed_dim=DIM, **options)
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.zeros((1, 2, DIM)), tokens_of(2)))
