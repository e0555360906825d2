"""Diffusion head: every continuous token is the end of a small diffusion process of its own (MAR, arXiv:2406.11838)."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.heads import gaussian_diffusion
from ar_jax.heads.adaln_mlp import AdaLNMLP
from ar_jax.heads.filters import check_no_filters
from ar_jax.heads.noise import Noise
from ar_jax.heads.protocol import Sampling


class Diffusion(nn.Module):
    """p(x | h) by reverse diffusion of x in R^C, with h as the condition of a residual MLP (arXiv:2406.11838, sec. 3.2).

    The MLP computes in `dtype`; noise, steps and losses are float32.

    Attributes:
      channels: the size of a token, C.
      depth: residual blocks of the MLP.
      width: of the MLP.
      num_sampling_steps: steps of the reverse process, out of those of training.
      train_steps: steps of the process that is trained.
      noise_schedule: how fast data turn into noise, one of `gaussian_diffusion.NOISE_SCHEDULES`.
      batch_multiplier: steps and noises drawn for each token in training; the transformer runs once for all of them.

    Raises:
      UsageError: sizes below 1, more sampling steps than training has, or an unknown schedule.
    """

    channels: int
    depth: int = 3
    width: int = 1024
    num_sampling_steps: int = 100
    train_steps: int = 1000
    noise_schedule: str = "cosine"
    batch_multiplier: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    has_likelihood: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the sizes before anything is traced."""
        for name in ("depth", "width", "batch_multiplier"):
            if getattr(self, name) < 1:
                raise UsageError(f"config.head.{name}={getattr(self, name)} must be at least 1.")
        gaussian_diffusion.respaced(self.train_steps, self.num_sampling_steps)
        choose(gaussian_diffusion.NOISE_SCHEDULES, self.noise_schedule, "head.noise_schedule")
        super().__post_init__()

    def setup(self) -> None:
        """The network."""
        self.network = AdaLNMLP(2 * self.channels, self.depth, self.width, self.dtype, self.param_dtype)

    def _levels(self) -> np.ndarray:
        """a_t of the training process."""
        return gaussian_diffusion.NOISE_SCHEDULES[self.noise_schedule](self.train_steps)

    def __call__(self, hidden: Array, noisy: Array, step: Array) -> Array:
        """Predicts the noise, and where its variance lies between its bounds.

        Args:
          hidden: [..., D].
          noisy: [..., C], x_t.
          step: [...] int32, t.

        Returns:
          [..., 2 C] float32; see `gaussian_diffusion`. Leading axes may be broadcast.
        """
        return self.network(noisy, self.network.embed_time(step) + self.network.embed_condition(hidden))

    def loss(
        self, hidden: Array, target: Array, key: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Array:
        """Squared error of the noise plus a variational term for its variance, [B, T]: the mean over random steps.

        Raises:
          UsageError: label smoothing or a z-loss, which a diffusion does not have.
        """
        if label_smoothing or z_loss:
            raise UsageError(
                "label_smoothing and z_loss are for head 'categorical'; set both to 0 for head 'diffusion'."
            )
        step_key, noise_key = jax.random.split(key)
        many = (self.batch_multiplier, *target.shape[:-1])
        step = jax.random.randint(step_key, many, 0, self.train_steps)
        squared, bits = self.terms(hidden, target, step, jax.random.normal(noise_key, (*many, self.channels)))
        return (squared + bits).mean(axis=0)

    def terms(self, hidden: Array, target: Array, step: Array, noise: Array) -> tuple[Array, Array]:
        """Both terms of the loss at given steps and noises; see `gaussian_diffusion.losses`.

        Args:
          hidden: [B, T, D].
          target: [B, T, C].
          step: [M, B, T] int32 below train_steps.
          noise: [M, B, T, C].

        Returns:
          Two arrays [M, B, T] float32.
        """
        process = gaussian_diffusion.make_steps(self._levels())
        numbers, target = process.at(step), target[None].astype(jnp.float32)
        predicted = self(hidden[None], gaussian_diffusion.diffused(numbers, target, noise), step)
        return gaussian_diffusion.losses(numbers, target, noise, predicted)

    def log_prob(self, hidden: Array, target: Array) -> Array:
        """A diffusion has no exact density.

        Raises:
          UsageError: always.
        """
        raise UsageError(
            "Head 'diffusion' has no exact log-likelihood; evaluate its loss or its samples, or use head 'gaussian_mixture'."
        )

    def sample(
        self,
        hidden: Array,
        noise: Noise,
        settings: Sampling,
        unguided: Array | None = None,
        guidance_scale: Array | float = 1.0,
    ) -> Array:
        """See Head; float32 [B, T, C]. The temperature scales the noise of each step, not the initial one.

        Guided noise is u + scale (c - u), both predicted at the same x_t; the variance is the conditional one.

        Raises:
          UsageError: a top_k, top_p or min_p filter.
        """
        check_no_filters(settings, "diffusion")
        kept = gaussian_diffusion.respaced(self.train_steps, self.num_sampling_steps)
        steps = gaussian_diffusion.make_steps(self._levels(), kept)
        module, variables = self.network.unbind()  # a pure function: its parameters are constants of the scan
        network: Any = functools.partial(module.apply, variables)
        times = self.network.embed_time(steps.time)
        branches = [hidden] if unguided is None else [hidden, unguided]
        condition = self.network.embed_condition(jnp.concatenate(branches)).reshape(-1, self.width)

        def predict(x: Array, time: Array) -> Array:
            flat = jnp.tile(x.reshape(-1, self.channels), (len(branches), 1))
            predicted = network(flat, time[None] + condition).reshape(len(branches), *x.shape[:-1], 2, self.channels)
            guesses, v = predicted[..., 0, :], predicted[0, ..., 1, :]
            guess = guesses[-1] + guidance_scale * (guesses[0] - guesses[-1])
            return jnp.concatenate([guess, v], axis=-1)

        shape = (*hidden.shape[:-1], self.channels)
        return gaussian_diffusion.sample(predict, steps, times, noise, shape, settings.temperature)
