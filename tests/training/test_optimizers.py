import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.config import UsageError
from ar_jax.training.optimizers import make_optimizer
from ar_jax.training.tables import OPTIMIZERS

RATE = 0.01


def make(kind, **options):
    return make_optimizer(
        OPTIMIZERS, {"kind": kind, "learning_rate": RATE, "clip_norm": 0.0} | options, lambda step: RATE
    )


def parameters(seed=0):
    shapes = {
        "embed": {"embedding": (7, 6)},
        "layers": {
            "query": {"kernel": (3, 6, 4), "bias": (3, 4)},
            "norm": {"scale": (3, 6)},
            "conv": {"kernel": (3, 5, 1, 6)},
        },
        "head": {"kernel": (6, 7), "bias": (7,)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    leaves, tree = jax.tree.flatten(shapes, is_leaf=is_shape)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in leaves])


def update(optimizer, params, gradients):
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, gradients)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_optimizer_goes_downhill(kind):
    optimizer, params = make(kind), parameters()

    @jax.jit
    def step(carry, _):
        params, state = carry
        loss, gradients = jax.value_and_grad(lambda p: optax.tree.norm(p, squared=True))(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.lax.scan(step, (params, jax.jit(optimizer.init)(params)), length=20)
    assert losses[-1] < 0.99 * losses[0] and np.all(np.isfinite(losses))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_by_rate_times_decay_and_nothing_else(kind):
    """Under a scan over layers biases and norms have two axes: a mask by rank would decay them."""
    params, gradients = parameters(), parameters(1)
    plain, decayed = (update(make(kind, weight_decay=w), params, gradients) for w in (0.0, 0.5))
    shrunk = jax.tree.map(lambda a, b: a - b, plain, decayed)
    expected = jax.tree.map(jnp.zeros_like, params)
    expected["layers"]["query"]["kernel"] = 0.5 * RATE * params["layers"]["query"]["kernel"]
    if kind != "muon":  # Muon leaves embeddings, head and depthwise kernels to Adam, which does not decay them
        expected["embed"]["embedding"] = 0.5 * RATE * params["embed"]["embedding"]
        expected["head"]["kernel"] = 0.5 * RATE * params["head"]["kernel"]
        expected["layers"]["conv"]["kernel"] = 0.5 * RATE * params["layers"]["conv"]["kernel"]
    chex.assert_trees_all_close(shrunk, expected, atol=1e-6)  # float32 differences of updates of size 0.01


def test_muon_orthogonalises_each_layer_of_a_stack_alone():
    params, gradients = parameters(), parameters(1)
    stacked = update(make("muon"), params, gradients)["layers"]["query"]["kernel"]
    for layer in range(3):
        one = lambda tree, i=layer: {"query": {"kernel": tree["layers"]["query"]["kernel"][i]}}  # noqa: E731
        alone = update(make("muon"), one(params), one(gradients))["query"]["kernel"]
        np.testing.assert_allclose(stacked[layer], alone, atol=1e-7)
        singular = np.linalg.svd(np.asarray(alone), compute_uv=False)
        assert singular.max() / singular.min() < 3  # five Newton-Schulz steps bring them near to one another
        np.testing.assert_allclose(np.sqrt(np.mean(alone**2)), 0.2 * RATE, rtol=0.4)  # consistent_rms


def test_muon_trains_all_but_hidden_matrices_with_adam():
    params, gradients = parameters(), parameters(1)
    muon, adam = update(make("muon"), params, gradients), optax.adamw(RATE, 0.9, 0.95, weight_decay=0.0, nesterov=True)
    expected = update(adam, params, gradients)
    for part in ("embed", "head"):
        chex.assert_trees_all_close(muon[part], expected[part], atol=1e-7)
    for part in ("norm", "conv"):
        chex.assert_trees_all_close(muon["layers"][part], expected["layers"][part], atol=1e-7)
    assert not np.allclose(muon["layers"]["query"]["kernel"], expected["layers"]["query"]["kernel"], atol=1e-4)


def test_gradients_are_clipped_to_the_global_norm():
    params, gradients = parameters(), parameters(1)
    clipped = update(make("sgd", clip_norm=0.25, b1=0.0), params, gradients)
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.25 * RATE, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "adamv"}, "Did you mean 'adamw'"),
        ({"kind": "adamw", "learning_rte": 1}, "Did you mean 'learning_rate'"),
        ({"kind": "adamw", "clipnorm": 1}, "Did you mean 'clip_norm'"),
        ({"kind": "lion", "eps": 1e-8}, "config.optimizer.eps"),
        ({"kind": "adamw", "clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"kind": "adamw", "clip_norm": "1"}, "clip_norm='1'"),
    ],
)
def test_bad_options_are_refused_with_the_nearest_name(options, words):
    with pytest.raises(UsageError, match=words):
        make_optimizer(OPTIMIZERS, options, lambda step: RATE)
