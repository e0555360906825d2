"""Linear attention's options: polynomials of all pairs (FAST), measured spreads (log-normal), tied keys, and wrong ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.common.feature_maps import matched_moments
from ar_jax.mixers.linear import MEASURED
from ar_jax.mixers.protocol import Tokens, merge_heads, split_heads

LENGTH, DIM, HEADS = 40, 8, 2


def tokens_of(length: int = LENGTH) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def started(**fields: Any) -> tuple[Any, Any, jax.Array]:
    """A mixer, its variables, and what it may read."""
    mixer = MIXERS["linear"](embed_dim=DIM, num_heads=HEADS, **fields)
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, DIM))
    return mixer, jax.jit(lambda x: mixer.init(jax.random.key(0), x, tokens_of()))(x), x


def heads_of(variables: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    params = variables["params"]
    return tuple(split_heads(x @ params[name]["kernel"], HEADS) for name in ("query", "key", "value"))


def attended(weights: jax.Array, v: jax.Array, variables: Any) -> jax.Array:
    """What weights [B, N, T, T], their rows brought to a sum of 1, make of values."""
    shares = weights / weights.sum(axis=-1, keepdims=True)
    return merge_heads(jnp.einsum("bnts,bsnh->btnh", shares, v)) @ variables["params"]["out"]["kernel"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("feature_map", "order"), [("line", 1), ("taylor", 2)])
def test_factorised_attention_is_the_polynomial_of_all_pairs_with_its_gradients(
    feature_map: str, order: int, causal: bool
) -> None:
    mixer, variables, x = started(feature_map=feature_map, qk_norm="plain", causal=causal)
    cotangent = jax.random.normal(jax.random.key(2), x.shape)

    def normalised(a: jax.Array) -> jax.Array:
        return (a - a.mean(axis=-1, keepdims=True)) / jnp.sqrt(a.var(axis=-1, keepdims=True) + 1e-6)

    def dense(variables: Any, x: jax.Array) -> jax.Array:
        q, k, v = heads_of(variables, x)
        score = jnp.einsum("btnh,bsnh->bnts", normalised(q), normalised(k)) * q.shape[-1] ** -0.5
        weights = 1 + score + (jnp.square(score) / 2 if order == 2 else 0)
        return attended(
            jnp.where(jnp.tril(jnp.ones((LENGTH,) * 2, bool))[None, None] | (not causal), weights, 0), v, variables
        )

    def loss(function: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *args: (function(*args) * cotangent).sum(), argnums=(0, 1)))

    found, right = (
        loss(f)(variables, x) for f in (lambda variables, x: mixer.apply(variables, x, tokens_of())[0], dense)
    )
    # Float32; of first order a sum of weights, some of them negative, may be small, and what is divided by it imprecise.
    tolerance = dict(rtol=1e-3, atol=2e-3) if order == 1 else dict(rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, right)


@pytest.mark.parametrize("block_size", [0, 16])
def test_log_normal_features_follow_the_spreads_that_training_measures(block_size: int) -> None:
    """With blocks the mean with softmax attention inside them."""
    mixer, variables, x = started(feature_map="exp", epsilon=1e-8, block_size=block_size)
    stored = jnp.asarray([0.2, -0.1])
    variables = {"params": variables["params"] | {"statistics": {"log_std": stored}}}
    q, k, v = heads_of(variables, x)
    alpha, beta = matched_moments(*jnp.exp(stored))
    weights = jnp.einsum("btnh,bsnh->bnts", jnp.exp(alpha * q), jnp.exp(beta * k))
    weights = jnp.where(jnp.tril(jnp.ones((LENGTH,) * 2, bool))[None, None], weights, 0)
    out, pull = jax.vjp(jax.jit(lambda variables: mixer.apply(variables, x, tokens_of())[0]), variables)
    right = attended(weights, v, variables)
    if block_size:
        place = jnp.arange(LENGTH)
        near = (place[:, None] >= place[None]) & (place[:, None] // block_size == place[None] // block_size)
        softmax = jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5)
        right = (right + attended(jnp.where(near[None, None], softmax, 0), v, variables)) / 2
    np.testing.assert_allclose(out, right, atol=2e-5)  # float32, exponentials of some nats
    change = pull(jnp.zeros_like(out))[0]["params"]["statistics"]["log_std"]
    measured = jnp.log(jnp.stack([q.std(), k.std()]))
    np.testing.assert_allclose(change, MEASURED * (measured - stored), rtol=1e-4)


def test_keys_that_are_what_is_forgotten_keep_a_mean() -> None:
    """HGRN2: of values that are all one each channel holds 1 less what is left of the beginning."""
    mixer, variables, x = started(
        feature_map="silu",
        decay="channel",
        decay_rank=0,
        decay_divisor=1.0,
        decay_floor=0.9,
        tied_keys=True,
        normalize=False,
    )
    ones = variables["params"] | {"value": {"kernel": jnp.zeros((DIM, DIM)).at[0].set(1)}}
    x = x.at[..., 0].set(1)
    forget = 0.9 + 0.1 * jax.nn.sigmoid(x @ variables["params"]["gate"]["kernel"])
    _, state = jax.jit(mixer.apply)({"params": ones}, x, tokens_of(), mixer.init_state(2, LENGTH, 1))
    held = split_heads(1 - jnp.prod(forget, axis=1)[:, None], HEADS)[:, 0]
    np.testing.assert_allclose(
        state.memory, jnp.broadcast_to(held[..., None], state.memory.shape), rtol=1e-4
    )  # float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=2"),
        (dict(feature_map="tailor"), "feature_map='tailor' is unknown. Did you mean 'taylor'"),
        (dict(rope_base=1e4, head_dim=3), "head_dim=3 is odd"),
        (dict(causal=False, decay="fixed"), "has no order in which to decay"),
        (dict(decay="channel", feature_map="taylor"), "features that are no channels"),
        (dict(tied_keys=True), "set decay='channel', not 'none'"),
        (dict(decay_floor=1.0), "decay_floor=1.0 must lie in"),
        (dict(block_size=4, normalize=False), "set normalize=True"),
    ],
)
def test_options_that_do_not_fit_are_told(fields: dict[str, Any], message: str) -> None:
    mixer = MIXERS["linear"](**dict(embed_dim=DIM, num_heads=HEADS) | fields)
    with pytest.raises(UsageError, match=message):
        mixer.init(jax.random.key(0), jnp.zeros((1, 2, DIM)), tokens_of(2))
