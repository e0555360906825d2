"""Gaussian diffusion against what is known of it: a Gaussian's own reverse process, exact posteriors, scipy's bins."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.config import UsageError
from ar_jax.heads import gaussian_diffusion as diffusion
from ar_jax.heads.noise import Drawn

MEAN, DEVIATION = jnp.asarray([0.7, -2.0])[None], jnp.asarray([0.5, 0.1])[None]


def process(num_steps: int = 200, kept: int | None = None) -> diffusion.Steps:
    return diffusion.make_steps(
        diffusion.cosine_schedule(num_steps), None if kept is None else diffusion.respaced(num_steps, kept)
    )


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (2, [0, 999]),
        (3, [0, 500, 999]),  # 499.5 and
        (7, [0, 166, 333, 500, 666, 832, 999]),  # 166.5 and 832.5: halves round to even
        (1000, list(range(1000))),
    ],
)
def test_respaced_steps_have_equal_strides_from_the_first_to_the_last(kept: int, expected: list[int]) -> None:
    np.testing.assert_array_equal(diffusion.respaced(1000, kept), expected)


@pytest.mark.parametrize("kept", [0, 1, 11])
def test_steps_that_do_not_exist_are_refused(kept: int) -> None:
    with pytest.raises(UsageError, match=f"num_sampling_steps={kept} must lie between 2 and train_steps=10"):
        diffusion.respaced(10, kept)


def test_the_schedule_falls_from_the_data_to_noise_and_no_step_is_too_long() -> None:
    levels = diffusion.cosine_schedule(1000)
    beta = 1 - levels / np.append(1.0, levels[:-1])
    assert levels[0] > 0.9999 and 0 < levels[-1] < 1e-8
    assert (beta > 0).all() and beta.max() == pytest.approx(0.999)


def perfect(steps: diffusion.Steps) -> Any:
    """The exact noise and variances of N(MEAN, DEVIATION^2): E[e | x_t], and v such that every reverse step is the true one."""

    def predict(x: jax.Array, step: diffusion.Steps) -> jax.Array:
        spread = (step.data_scale * DEVIATION) ** 2 + step.noise_scale**2  # of x_t
        noise = step.noise_scale * (x - step.data_scale * MEAN) / spread
        data_variance = (DEVIATION * step.noise_scale) ** 2 / spread  # of x_0 given x_t
        variance = step.mean_of_data**2 * data_variance + (1 - step.first) * jnp.exp(step.least_log_variance)
        share = (jnp.log(variance) - step.least_log_variance) / (step.most_log_variance - step.least_log_variance)
        return jnp.concatenate([noise, jnp.broadcast_to(2 * share - 1, noise.shape)], axis=-1)

    return predict


@pytest.mark.parametrize("kept", [5, 25, None])
def test_the_exact_network_of_a_gaussian_gives_its_mean_and_deviation(kept: int | None) -> None:
    """The reverse steps of a Gaussian are Gaussians, so any number of them is exact, but for the last, which is the mean."""
    steps = process(kept=kept)
    draw = jax.jit(lambda key, t: diffusion.sample(perfect(steps), steps, steps, Drawn(key), (20000, 2), t))
    drawn = draw(jax.random.key(0), 1.0)
    np.testing.assert_allclose(drawn.mean(axis=0), MEAN[0], atol=5 * 0.5 / 20000**0.5)
    np.testing.assert_allclose(drawn.std(axis=0), DEVIATION[0], rtol=0.03)  # five deviations, and the last step's
    colder = draw(jax.random.key(0), 0.5).std(axis=0)
    assert (colder < 0.9 * DEVIATION[0]).all()


def terms(steps: diffusion.Steps, t: jax.Array, data: jax.Array, noise: jax.Array, predicted: jax.Array) -> Any:
    return diffusion.losses(steps.at(t), data, noise, predicted)


def test_true_noise_and_the_least_variance_leave_nothing_to_lose_after_the_first_step() -> None:
    steps, t = process(), jnp.arange(1, 200)
    data, noise = (jax.random.normal(jax.random.key(seed), (199, 3)) for seed in (0, 1))
    squared, bits = terms(steps, t, data, noise, jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1))
    np.testing.assert_array_equal(squared, 0)
    # The mean is computed from x_0 = (x_t - noise) / signal: float32, and the signal is down to 1e-5.
    np.testing.assert_allclose(bits[:150], 0, atol=1e-5)
    np.testing.assert_allclose(bits, 0, atol=1e-2)


def test_the_first_step_pays_the_bits_of_a_bin() -> None:
    steps, t = process(), jnp.zeros(4, jnp.int32)
    data = jnp.asarray([[0.3], [-0.5], [1.0], [-1.0]])  # the last two in the outermost bins
    guess, v = jnp.asarray([[0.2], [-0.3], [0.5], [0.1]]), jnp.full((4, 1), 0.4)
    noise = jnp.asarray([[0.1], [0.4], [0.2], [0.3]])
    _, bits = terms(steps, t, data, noise, jnp.concatenate([guess, v], axis=-1))
    step = jax.tree.map(float, jax.tree.map(lambda a: a[0], steps))
    mean = (step.data_scale * data + step.noise_scale * (noise - guess)) / step.data_scale
    scale = np.exp(0.5 * (0.7 * step.most_log_variance + 0.3 * step.least_log_variance))
    normal = stats.norm(mean, scale)
    upper, lower = np.where(data > 0.999, 1, normal.cdf(data + 1 / 255)), normal.cdf(data - 1 / 255)
    expected = -np.log2(upper - np.where(data < -0.999, 0, lower))
    np.testing.assert_allclose(bits, expected[:, 0], rtol=2e-3)  # the tanh's error


def test_the_variational_term_trains_the_variance_alone() -> None:
    steps, t = process(), jnp.asarray([0, 1, 100, 199])
    data, noise, guess, v = (jax.random.normal(jax.random.key(seed), (4, 3)) for seed in range(4))

    def total(guess: jax.Array, v: jax.Array, which: int) -> jax.Array:
        return terms(steps, t, data, noise, jnp.concatenate([guess, v], axis=-1))[which].sum()

    by_guess, by_v = jax.grad(total, (0, 1))(guess, v, 1)
    assert (by_guess == 0).all() and (by_v != 0).any() and jnp.isfinite(by_v).all()
    by_guess, by_v = jax.grad(total, (0, 1))(guess, v, 0)
    assert (by_guess != 0).all() and (by_v == 0).all()
