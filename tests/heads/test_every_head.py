"""What every head promises, and what is special to each: densities against independent libraries, guided draws."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.scipy.special import logsumexp
from scipy import stats

from ar_jax.config import UsageError
from ar_jax.heads import HEADS
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.mixture import GaussianMixture
from ar_jax.heads.noise import Drawn
from ar_jax.heads.protocol import Sampling
from ar_jax.heads.variational import Variational

CASES: dict[str, nn.Module] = {
    "categorical": Categorical(vocab_size=5),
    "gaussian_mixture": GaussianMixture(channels=2, num_components=3),
    "diffusion": Diffusion(channels=2, depth=1, width=8, num_sampling_steps=4, train_steps=20),
    "variational": Variational(embed_dim=4, vocab_size=5, latent_dim=2, num_layers=1),
}
EXACT = ("categorical", "gaussian_mixture")  # heads with a likelihood
CONTINUOUS = ("gaussian_mixture", "diffusion")
ONE_BY_ONE = tuple(kind for kind in CASES if kind != "variational")  # tokens of one call are independent
DIM, MANY = 4, 20000


def params_of(head: Any, seed: int = 0) -> Any:
    """Parameters of order one: the categorical head begins with zeros."""
    target = jnp.zeros((1, 1, head.channels)) if getattr(head, "channels", 0) else jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(head.init, method="loss")
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1, DIM)), target, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)

    @jax.jit
    def draw(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(leaves))
        return [0.7 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]

    return jax.tree.unflatten(tree, draw(jax.random.key(seed)))


def hidden_of(batch: int = 2, time: int = 3, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, time, DIM))


def test_every_head_has_a_row() -> None:
    assert set(CASES) == set(HEADS)


@pytest.mark.parametrize("kind", EXACT)
def test_loss_is_the_negative_log_likelihood_of_what_is_sampled(kind: str) -> None:
    head, hidden = CASES[kind], hidden_of()
    params = params_of(head)
    target = head.apply(params, hidden, Drawn(jax.random.key(0)), Sampling(), method="sample")
    log_p = head.apply(params, hidden, target, method="log_prob")
    loss = head.apply(params, hidden, target, jax.random.key(0), method="loss")
    assert target.shape[:2] == log_p.shape == loss.shape == (2, 3)
    assert log_p.dtype == loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, -log_p, rtol=1e-5)  # float32, other order of sums


@pytest.mark.parametrize("kind", EXACT)
def test_log_prob_is_normalised_and_describes_the_samples(kind: str) -> None:
    """E[d log p(x) / d theta] = 0 under p alone: every parameter's mean score is within the noise of its mean."""
    head, params = CASES[kind], params_of(CASES[kind])
    hidden = hidden_of(1, 1)

    def score(target: jax.Array) -> jax.Array:
        def log_p(params: Any) -> jax.Array:
            return head.apply(params, hidden, target[None, None], method="log_prob")[0, 0]

        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(jax.grad(log_p)(params))])

    @jax.jit
    def deviations(temperature: jax.Array) -> jax.Array:
        many = jnp.broadcast_to(hidden, (1, MANY, DIM))
        settings = Sampling(temperature=temperature)
        scores = jax.vmap(score)(head.apply(params, many, Drawn(jax.random.key(2)), settings, method="sample")[0])
        return jnp.abs(scores.mean(axis=0)) / (scores.std(axis=0) / MANY**0.5 + 1e-9)

    assert deviations(1.0).max() < 4.5
    assert deviations(1.5).max() > 10  # samples of another distribution are told apart


@pytest.mark.parametrize("kind", CASES)
def test_a_key_fixes_the_samples_and_another_changes_them(kind: str) -> None:
    head, hidden = CASES[kind], hidden_of(4, 8)
    params = params_of(head)
    keys = [jax.random.key(seed) for seed in (3, 3, 4)]
    sample = jax.jit(lambda key: head.apply(params, hidden, Drawn(key), Sampling(), method="sample"))
    first, again, other = map(sample, keys)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_at_guidance_scale_one_the_unconditional_branch_does_not_matter(kind: str) -> None:
    """Likewise for equal branches at any scale: the mean of many draws is the conditional one."""
    head, params = CASES[kind], params_of(CASES[kind])
    hidden, other = (jnp.broadcast_to(hidden_of(1, 1, seed), (1, 8000, DIM)) for seed in (1, 2))

    @jax.jit
    def mean(unguided: jax.Array, scale: jax.Array) -> jax.Array:
        drawn = head.apply(params, hidden, Drawn(jax.random.key(5)), Sampling(), unguided, scale, method="sample")
        return drawn[0].astype(jnp.float32).mean(axis=0)

    alone = head.apply(params, hidden, Drawn(jax.random.key(6)), Sampling(), method="sample")[0].astype(jnp.float32)
    noise = 5 * alone.std(axis=0) * (2 / 8000) ** 0.5  # of the difference of two means
    assert (jnp.abs(mean(other, 1.0) - alone.mean(axis=0)) < noise).all()
    assert (jnp.abs(mean(hidden, 3.0) - alone.mean(axis=0)) < noise).all()
    assert (jnp.abs(mean(other, 3.0) - alone.mean(axis=0)) > noise).any()


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.05)])
def test_the_categorical_loss_is_that_of_optax_with_smoothing_and_z_loss(label_smoothing: float, z_loss: float) -> None:
    head, hidden = CASES["categorical"], hidden_of()
    params = params_of(head)
    target = jnp.asarray([[0, 1, 2], [3, 4, 0]])
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    loss = head.apply(params, hidden, target, jax.random.key(0), **options, method="loss")
    logits = head.apply(params, hidden)
    labels = optax.smooth_labels(jax.nn.one_hot(target, 5), label_smoothing)
    expected = optax.softmax_cross_entropy(logits, labels) + z_loss * logsumexp(logits, axis=-1) ** 2
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # float32, other order of sums


def test_guided_categorical_samples_follow_the_extrapolated_logits() -> None:
    head, params = CASES["categorical"], params_of(CASES["categorical"])
    hidden, other = (jnp.broadcast_to(hidden_of(1, 1, seed), (1, MANY, DIM)) for seed in (1, 2))
    drawn = head.apply(params, hidden, Drawn(jax.random.key(0)), Sampling(), other, 2.5, method="sample")
    told, untold = head.apply(params, hidden)[0, 0], head.apply(params, other)[0, 0]
    expected = jax.nn.softmax(untold + 2.5 * (told - untold))
    np.testing.assert_allclose(np.bincount(drawn[0], minlength=5) / MANY, expected, atol=0.015)  # four deviations


def numpy_mixture(head: Any, params: Any, hidden: jax.Array) -> list[tuple[float, Any]]:
    """The weights and scipy's normal distributions of one hidden vector."""
    log_weights, means, scales = (np.asarray(a[0, 0], np.float64) for a in head.apply(params, hidden))
    normals = [stats.multivariate_normal(m, np.diag(s**2)) for m, s in zip(means, scales, strict=True)]
    return list(zip(np.exp(log_weights), normals, strict=True))


def test_the_mixture_density_is_that_of_scipy_and_integrates_to_one() -> None:
    head, params, hidden = CASES["gaussian_mixture"], params_of(CASES["gaussian_mixture"]), hidden_of(1, 1)
    mixture = numpy_mixture(head, params, hidden)
    assert sum(weight for weight, _ in mixture) == pytest.approx(1, rel=1e-5)
    side = np.linspace(-9, 9, 181)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)
    many = jnp.broadcast_to(hidden, (1, len(grid), DIM))
    density = np.exp(np.asarray(head.apply(params, many, grid[None], method="log_prob")[0], np.float64))
    expected = sum(weight * normal.pdf(grid) for weight, normal in mixture)
    np.testing.assert_allclose(density, expected, rtol=1e-3, atol=1e-12)  # float32 exponents of up to a hundred
    assert density.sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_mixture_samples_have_the_mixtures_mean_and_covariance() -> None:
    head, params, hidden = CASES["gaussian_mixture"], params_of(CASES["gaussian_mixture"]), hidden_of(1, 1)
    mixture = numpy_mixture(head, params, hidden)
    many = jnp.broadcast_to(hidden, (1, MANY, DIM))
    drawn = np.asarray(head.apply(params, many, Drawn(jax.random.key(0)), Sampling(), method="sample")[0])
    mean = sum(weight * normal.mean for weight, normal in mixture)
    second = sum(weight * (normal.cov + np.outer(normal.mean, normal.mean)) for weight, normal in mixture)
    covariance = second - np.outer(mean, mean)
    deviation = np.sqrt(covariance.max() / MANY)
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=5 * deviation)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.06 * covariance.max())  # five deviations


def test_a_mixture_at_temperature_zero_gives_the_mean_of_a_component() -> None:
    head, params, hidden = CASES["gaussian_mixture"], params_of(CASES["gaussian_mixture"]), hidden_of(1, 200)
    drawn = head.apply(params, hidden, Drawn(jax.random.key(0)), Sampling(temperature=0.0), method="sample")
    _, means, _ = head.apply(params, hidden)
    assert (jnp.abs(means - drawn[:, :, None]).max(axis=-1).min(axis=-1) < 1e-6).all()


def one_gaussian(mean: float) -> tuple[GaussianMixture, Any]:
    """A head that gives N(mean * h, 1) for the hidden vector h in R^1."""
    head = GaussianMixture(channels=1, num_components=1, min_scale=0.0)
    one = np.log(np.expm1(1.0))  # softplus of it is one
    weights = {"kernel": jnp.asarray([[0.0, mean, 0.0]]), "bias": jnp.asarray([0.0, 0.0, one])}
    return head, {"params": {"parameters": weights}}


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guided_mixture_samples_move_along_the_condition(scale: float) -> None:
    """N(1, 1)^s N(0, 1)^(1-s) is N(s, 1) up to its integral; 32 candidates reach it to a few percent."""
    head, params = one_gaussian(1.0)
    with_condition, without = jnp.ones((1, MANY, 1)), jnp.zeros((1, MANY, 1))
    drawn = head.apply(params, with_condition, Drawn(jax.random.key(0)), Sampling(), without, scale, method="sample")
    assert float(drawn.mean()) == pytest.approx(scale, abs=0.1)


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_continuous_heads_refuse_the_filters_of_a_vocabulary(kind: str, setting: dict[str, Any]) -> None:
    head, params = CASES[kind], params_of(CASES[kind])
    with pytest.raises(UsageError, match="filter a vocabulary"):
        head.apply(params, hidden_of(), Drawn(jax.random.key(0)), Sampling(**setting), method="sample")


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("setting", [{"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_continuous_heads_refuse_the_losses_of_a_vocabulary(kind: str, setting: dict[str, float]) -> None:
    head, params = CASES[kind], params_of(CASES[kind])
    with pytest.raises(UsageError, match="head 'categorical'"):
        head.apply(params, hidden_of(), jnp.zeros((2, 3, 2)), jax.random.key(0), **setting, method="loss")
