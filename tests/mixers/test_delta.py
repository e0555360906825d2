"""Delta rules: the layer is its equation, products of two writes turn the memory, and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.delta import delta_product
from ar_jax.mixers.protocol import Tokens


def tokens_of(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


OF_CHANNELS = dict(decay="channel", decay_rank=3, lower_bound=-5.0, gate="sigmoid", gate_rank=4)


@pytest.mark.parametrize("options", [dict(), OF_CHANNELS], ids=["gated DeltaNet", "Kimi delta attention"])
def test_the_layer_is_its_equation(options: dict[str, Any]) -> None:
    """Two heads of queries and keys serve four of values; the convolution, the decay and the gate as published."""
    length, dim, heads, values, key_dim, value_dim = 5, 8, 2, 4, 3, 2
    mixer = MIXERS["delta"](
        embed_dim=dim,
        num_heads=heads,
        num_value_heads=values,
        head_dim=key_dim,
        value_head_dim=value_dim,
        width=2,
        **options,
    )
    x = np.random.default_rng(0).normal(size=(1, length, dim)).astype(np.float32)
    variables = jax.jit(lambda: mixer.init(jax.random.key(0), x, tokens_of(length)))()
    p = jax.tree.map(np.asarray, variables["params"])

    def through(y: np.ndarray, *names: str) -> np.ndarray:
        for name in names:
            y = y @ p[name]["kernel"] + p[name].get("bias", 0)
        return y

    joined = np.concatenate([through(x[0], name) for name in ("query", "key", "value")], axis=-1)
    filters = p["convolution"]["filters"]
    joined = filters[0] * joined + filters[1] * np.concatenate([np.zeros_like(joined[:1]), joined[:-1]])
    joined = joined * sigmoid(joined)
    q, k = (part.reshape(length, heads, key_dim) for part in np.split(joined[:, : 2 * heads * key_dim], 2, axis=-1))
    q, k = (np.repeat(a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6), 2, axis=1) for a in (q, k))
    v = joined[:, 2 * heads * key_dim :].reshape(length, values, value_dim)
    beta = sigmoid(through(x[0], "beta"))
    rate = np.exp(p["log_rate"])[:, None]
    if options:
        raw = through(x[0], "decay_down", "decay_up") + p["decay_bias"]
        decay = np.exp(-5 * sigmoid(rate * raw.reshape(length, values, key_dim)))
        opened = sigmoid(through(x[0], "gate_down", "gate_up"))
    else:
        decay = np.exp(-rate * np.log1p(np.exp(through(x[0], "decay_up") + p["decay_bias"]))[..., None])
        opened = through(x[0], "gate_up") * sigmoid(through(x[0], "gate_up"))
    memory, right = np.zeros((values, key_dim, value_dim)), []
    for t in range(length):
        memory = decay[t][:, :, None] * memory
        surprise = v[t] - np.einsum("nhe,nh->ne", memory, k[t])
        memory = memory + beta[t][:, None, None] * k[t][:, :, None] * surprise[:, None, :]
        read = np.einsum("nhe,nh->ne", memory, q[t]) * key_dim**-0.5
        normed = read / np.sqrt((read**2).mean(-1, keepdims=True) + 1e-5)
        right.append((normed.reshape(-1) * opened[t]) @ p["out"]["kernel"])
    found = jax.jit(lambda variables: mixer.apply(variables, x, tokens_of(length))[0])(variables)
    np.testing.assert_allclose(found[0], np.stack(right), atol=2e-5)  # float32, sums of some ten terms


def test_two_writes_a_token_turn_the_memory_as_one_never_can() -> None:
    """Two reflections, across lines at an angle of a twelfth of a circle, are a turn by a sixth: six tokens close the circle."""
    angle = np.pi / 6
    keys = np.asarray([[1.0, 0.0], [np.cos(angle), np.sin(angle)]], np.float32)
    k = jnp.broadcast_to(keys[None, None, :, None], (1, 6, 2, 1, 2))
    v, beta = jnp.zeros((1, 6, 2, 1, 2)), jnp.full((1, 6, 2, 1), 2.0)
    q = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (1, 6, 1, 2))
    out, state = delta_product(q, k, v, beta, initial_state=jnp.eye(2)[None, None], chunk_size=4)
    turns = 2 * angle * np.arange(1, 7)
    np.testing.assert_allclose(out[0, :, 0, 0], np.cos(turns), atol=1e-5)  # float32, a dozen products
    np.testing.assert_allclose(state[0, 0], np.eye(2), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide embed_dim=8"),
        (dict(num_heads=2, num_value_heads=3), "num_value_heads=3 must be a multiple of num_heads=2"),
        (dict(num_heads=2, decay="heads"), "model.mixer.decay='heads' is unknown. Did you mean 'head'"),
        (
            dict(num_heads=2, lower_bound=-5.0),
            "lower_bound=-5.0 must be below 0, in nats, and belongs to decay='channel'",
        ),
        (dict(num_heads=2, num_writes=0), "num_writes=0 must be at least 1"),
        (dict(num_heads=2, width=1), "width=1 must be at least 2"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    mixer = MIXERS["delta"](embed_dim=8, **options)
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.zeros((1, 2, 8)), tokens_of(2)))
