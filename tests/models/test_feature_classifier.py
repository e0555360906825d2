"""Conditioned attention: its equations, padding that nobody reads, and features that tell where to look."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers.common.conditioned_energy import CONDITIONINGS
from ar_jax.models.conditioned_attention import ConditionedAttention, FeatureClassifier


def drawn(shapes: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), shapes)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_pooled_vector_is_that_of_the_equation(conditioning: str, num_layers: int) -> None:
    rng, kept = np.random.default_rng(1), 4
    h, c = np.float32(rng.normal(size=(1, 6, 3))), np.float32(rng.normal(size=(1, 6, 2)))
    module, present = ConditionedAttention(conditioning, num_layers), jnp.arange(6)[None] < kept
    params = drawn(jax.eval_shape(module.init, jax.random.key(0), h, c))
    read, weights = module.apply(params, h, c, present)

    def dense(name: str, a: np.ndarray) -> np.ndarray:
        layer = params["params"]["energy"][name]
        return a @ layer["kernel"] + layer["bias"]

    judged = {
        "none": lambda: h,
        "concat": lambda: np.concatenate([h, c], axis=-1),
        "gate": lambda: h / (1 + np.exp(-dense("gate", c))),
        "affine": lambda: h * dense("scale", c) + dense("shift", c),
        "tanh_affine": lambda: np.tanh(h * dense("scale", c) + dense("shift", c)),
    }[conditioning]()
    judged = np.tanh(dense("layer_0", judged)) if num_layers == 2 else judged
    shares = np.exp(dense("score", judged)[..., 0]) * np.asarray(present)
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, shares, atol=1e-6)
    np.testing.assert_allclose(read, (shares[..., None] * h).sum(axis=1), atol=1e-5)


def test_padding_is_read_by_nobody() -> None:
    places = ("embedding", "encoder")
    model = FeatureClassifier(9, 3, 5, 4, bidirectional=True, conditioning="concat", joined=places)
    rng = np.random.default_rng(2)
    tokens, features = rng.integers(9, size=(2, 6)), np.float32(rng.normal(size=(2, 6, 2)))
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), tokens, features))
    apply = jax.jit(model.apply)
    logits, weights = apply(params, tokens, features, jnp.asarray([6, 4]))
    alone, _ = apply(params, tokens[1:, :4], features[1:, :4], jnp.asarray([4]))
    np.testing.assert_allclose(logits[1:], alone, atol=1e-5)
    assert not weights[1, 4:].any() and weights[1, :4].all()
    with pytest.raises(UsageError, match="reads features"):
        apply(params, tokens)


def accuracy_of(conditioning: str) -> float:
    """After a short training: the class is that of the one token of six that a lexicon marks."""
    model, optimizer = FeatureClassifier(4, 4, 8, rnn_layers=0, conditioning=conditioning), optax.adam(0.05)

    def loss(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        token_key, mark_key = jax.random.split(key)
        tokens = jax.random.randint(token_key, (64, 6), 0, 4)
        marked = jax.random.randint(mark_key, (64, 1), 0, 6)
        logits, _ = model.apply(params, tokens, jax.nn.one_hot(marked[:, 0], 6)[..., None])
        labels = jnp.take_along_axis(tokens, marked, axis=1)[:, 0]
        right = (logits.argmax(axis=-1) == labels).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), right

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        gradient, right = jax.grad(loss, has_aux=True)(params, key)
        change, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, change), state), right

    @jax.jit
    def trained(key: jax.Array) -> jax.Array:
        params = model.init(key, jnp.zeros((1, 6), jnp.int32), jnp.zeros((1, 6, 1)))
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 150))[1]

    return float(trained(jax.random.key(0))[-20:].mean())


def test_features_tell_attention_where_to_look() -> None:
    assert accuracy_of("affine") > 0.9 > 0.7 > accuracy_of("none")
