"""Gaussian diffusion in discrete steps (DDPM, arXiv:2006.11239), with learned variances (arXiv:2102.09672).

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, with e normal and a_t = prod_s<=t (1 - beta_s). A network is shown x_t and predicts
(e | v): the noise, and where between its two bounds the logarithm of the reverse step's variance lies, v in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from ar_jax.config import UsageError
from ar_jax.heads.noise import Noise


@struct.dataclass
class Steps:
    """The numbers of each step, all [S] (or one step's, gathered and with axes of size 1), float32 from float64 tables.

    Attributes:
      time: the step of the training process that the network is told, float32.
      data_scale: sqrt(a); x_t = data_scale x_0 + noise_scale e.
      noise_scale: sqrt(1 - a).
      inverse_data_scale: 1 / sqrt(a); x_0 = inverse_data_scale x_t - noise_ratio e.
      noise_ratio: sqrt(1 / a - 1).
      mean_of_data: E[x_before | x_t, x_0] = mean_of_data x_0 + mean_of_noisy x_t.
      mean_of_noisy: see mean_of_data.
      least_log_variance: of x_before given x_t and x_0; the first step, which has none, takes that of the second.
      most_log_variance: log beta.
      first: 1 for the step that leads to the data, else 0.
    """

    time: Array
    data_scale: Array
    noise_scale: Array
    inverse_data_scale: Array
    noise_ratio: Array
    mean_of_data: Array
    mean_of_noisy: Array
    least_log_variance: Array
    most_log_variance: Array
    first: Array

    def at(self, t: Array) -> Steps:
        """The numbers of steps t [...] int32, each [..., 1]."""
        return jax.tree.map(lambda table: table[t][..., None], self)


def cosine_schedule(num_steps: int) -> np.ndarray:
    """a_t of the squared-cosine schedule, [num_steps] float64; no beta above 0.999 (arXiv:2102.09672, eq. 17)."""
    level = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999))


def linear_schedule(num_steps: int) -> np.ndarray:
    """a_t with beta from 1e-4 to 0.02 in 1000 steps, or as much in another number, [num_steps] float64 (arXiv:2006.11239).

    What is left of the data in the last step is more than with the cosine, and an error in the first noise that is
    predicted in sampling weighs hundreds of times less: better for a network of little training.
    """
    return np.cumprod(1 - np.minimum(np.linspace(0.1, 20, num_steps) / num_steps, 0.999))


NOISE_SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


def respaced(num_steps: int, num_kept: int) -> np.ndarray:
    """[num_kept] steps out of num_steps, from the first to the last at equal strides; halves round to even.

    Raises:
      UsageError: fewer than two steps, or more than there are.
    """
    if not 2 <= num_kept <= num_steps:
        raise UsageError(f"num_sampling_steps={num_kept} must lie between 2 and train_steps={num_steps}.")
    stride = (num_steps - 1) / (num_kept - 1)
    # Added up, not multiplied: the official rounding errors decide which way a half goes.
    return np.round(np.cumsum([0.0, *[stride] * (num_kept - 1)])).astype(np.int64)


def make_steps(levels: np.ndarray, kept: np.ndarray | None = None) -> Steps:
    """The numbers of a process, or of one that jumps between some of its steps.

    Args:
      levels: [T] float64, a_t of the training process, falling.
      kept: [S] increasing, the steps to keep; None keeps all.
    """
    kept = np.arange(len(levels)) if kept is None else kept
    a = levels[kept]
    before = np.append(1.0, a[:-1])
    beta = 1 - a / before
    variance = beta * (1 - before) / (1 - a)
    table = dict(
        time=kept,
        data_scale=np.sqrt(a),
        noise_scale=np.sqrt(1 - a),
        inverse_data_scale=np.sqrt(1 / a),
        noise_ratio=np.sqrt(1 / a - 1),
        mean_of_data=beta * np.sqrt(before) / (1 - a),
        mean_of_noisy=(1 - before) * np.sqrt(1 - beta) / (1 - a),
        least_log_variance=np.log(np.append(variance[1], variance[1:])),
        most_log_variance=np.log(beta),
        first=np.arange(len(kept)) == 0,
    )
    return Steps(**{name: jnp.asarray(column, jnp.float32) for name, column in table.items()})


def diffused(step: Steps, data: Array, noise: Array) -> Array:
    """x_t of x_0 = data; see Steps."""
    return step.data_scale * data + step.noise_scale * noise


def posterior_mean(step: Steps, data: Array, noisy: Array) -> Array:
    """E[x_before | x_t = noisy, x_0 = data]."""
    return step.mean_of_data * data + step.mean_of_noisy * noisy


def reverse_step(step: Steps, noisy: Array, predicted: Array) -> tuple[Array, Array]:
    """Mean and log variance of p(x_before | x_t), [..., C], from the network's (e | v) [..., 2 C]."""
    noise, v = jnp.split(predicted, 2, axis=-1)
    data = step.inverse_data_scale * noisy - step.noise_ratio * noise
    most = (v + 1) / 2
    return posterior_mean(step, data, noisy), most * step.most_log_variance + (1 - most) * step.least_log_variance


def losses(step: Steps, data: Array, noise: Array, predicted: Array) -> tuple[Array, Array]:
    """What the network minimises: |e - predicted e|^2, and for v alone the step's part of the variational bound.

    The bound's part is KL(q(x_before | x_t, x_0) || p(x_before | x_t)), or in the first step -log p(x_0 | x_t) with x_0 in
    bins of 2/255, as images of 256 levels have.

    Args:
      step: the steps of the elements, [..., 1].
      data: [..., C], x_0.
      noise: [..., C], e.
      predicted: [..., 2 C], of x_t = diffused(step, data, noise).

    Returns:
      Two arrays [...], means over channels; the second in bits.
    """
    noisy, (guess, v) = diffused(step, data, noise), jnp.split(predicted, 2, axis=-1)
    frozen = jnp.concatenate([jax.lax.stop_gradient(guess), v], axis=-1)
    mean, log_variance = reverse_step(step, noisy, frozen)
    divergence = _divergence(posterior_mean(step, data, noisy), step.least_log_variance, mean, log_variance)
    nats = jnp.where(step.first > 0, -_log_bin(data, mean, 0.5 * log_variance), divergence)
    return jnp.square(noise - guess).mean(axis=-1), nats.mean(axis=-1) / np.log(2)


def sample(
    predict: Callable[[Array, Any], Array],
    steps: Steps,
    told: Any,
    noise: Noise,
    shape: tuple[int, ...],
    temperature: ArrayLike = 1.0,
) -> Array:
    """Ancestral sampling: x_before = mean + temperature sqrt(variance) normal, from pure noise to x_0; one scan.

    Args:
      predict: (x [*shape], one step's part of `told`) to (e | v), [..., 2 C].
      steps: the steps to take, [S].
      told: a pytree of [S, ...], what the network is told about each step.
      noise: "init", and "step" of fold_in(s), s = 0 being the noisiest step; the last step adds none.
      shape: [..., C] of the samples.
      temperature: scales the noise of the steps, not the initial one.

    Returns:
      shape, float32.
    """
    num_steps = len(steps.time)

    def body(x: Array, now: tuple[Array, Steps, Any]) -> tuple[Array, None]:
        s, step, about = now
        mean, log_variance = reverse_step(step, x, predict(x, about))
        fresh = noise.fold_in(s).normal("step", shape)
        return mean + (1 - step.first) * temperature * jnp.exp(0.5 * log_variance) * fresh, None

    order = jnp.arange(num_steps - 1, -1, -1)  # in reverse: the tables begin with the step that leads to the data
    return jax.lax.scan(body, noise.normal("init", shape), (order, steps, told), reverse=True)[0]


def _divergence(mean: Array, log_variance: Array, other_mean: Array, other_log_variance: Array) -> Array:
    """KL(N(mean, variance) || N(other)) in nats, of every element."""
    difference = log_variance - other_log_variance
    return 0.5 * (jnp.exp(difference) - difference - 1 + jnp.square(mean - other_mean) * jnp.exp(-other_log_variance))


def _log_bin(x: Array, mean: Array, log_scale: Array) -> Array:
    """log of the normal's mass in [x - 1/255, x + 1/255]; the outermost bins reach to infinity."""
    inverse = jnp.exp(-log_scale)
    upper = _cumulative(inverse * (x - mean + 1 / 255))
    lower = _cumulative(inverse * (x - mean - 1 / 255))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _cumulative(x: Array) -> Array:
    """The standard normal's distribution function by the tanh that GELU is approximated with."""
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
