"""Mixture head for continuous tokens: a Gaussian mixture per token, each component with its own mean and scales."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.heads.filters import check_no_filters
from ar_jax.heads.noise import Noise
from ar_jax.heads.protocol import Sampling


class GaussianMixture(nn.Module):
    """p(x | h) = sum_m w_m N(x; mu_m, diag(sigma_m^2)) over x in R^C (cf. GIVT, arXiv:2312.02116).

    Attributes:
      channels: the size of a token, C.
      min_scale: lower bound of sigma, which keeps the density bounded on data that repeats exactly.
      num_candidates: guided samples are chosen among so many draws of the conditional mixture, weighted by
        (p(x | c) / p(x))^(scale - 1): sampling-importance-resampling of p(x)^(1-scale) p(x | c)^scale.
    """

    channels: int
    num_components: int = 8
    min_scale: float = 0.02
    num_candidates: int = 32
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    has_likelihood: ClassVar[bool] = True

    def setup(self) -> None:
        """One projection to weights, means and scales."""
        width = self.num_components * (1 + 2 * self.channels)
        self.parameters = nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(self, hidden: Array) -> tuple[Array, Array, Array]:
        """[B, T, D] to log weights [B, T, M], means and scales [B, T, M, C], float32."""
        out = self.parameters(hidden).astype(jnp.float32)
        weights, rest = jnp.split(out, [self.num_components], axis=-1)
        means, scales = jnp.split(rest.reshape(*rest.shape[:-1], self.num_components, 2 * self.channels), 2, axis=-1)
        return jax.nn.log_softmax(weights), means, nn.softplus(scales) + self.min_scale

    def log_prob(self, hidden: Array, target: Array) -> Array:
        """Log density in nats, [B, T], of target [B, T, C]."""
        return _log_density(self(hidden), target[..., None, :])[..., 0]

    def loss(
        self, hidden: Array, target: Array, key: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Array:
        """Negative log density in nats, [B, T].

        Raises:
          UsageError: label smoothing or a z-loss, which a density does not have.
        """
        if label_smoothing or z_loss:
            raise UsageError(
                "label_smoothing and z_loss are for head 'categorical'; set both to 0 for head 'gaussian_mixture'."
            )
        return -self.log_prob(hidden, target)

    def sample(
        self,
        hidden: Array,
        noise: Noise,
        settings: Sampling,
        unguided: Array | None = None,
        guidance_scale: Array | float = 1.0,
    ) -> Array:
        """See Head; float32 [B, T, C]. The temperature scales each component's deviation.

        Raises:
          UsageError: a top_k, top_p or min_p filter.
        """
        check_no_filters(settings, "gaussian_mixture")
        mixture = self(hidden)
        candidates = 1 if unguided is None else self.num_candidates
        log_weights, means, scales = mixture
        picks = noise.gumbel("component", (candidates, *log_weights.shape))
        component = (log_weights[None] + picks).argmax(axis=-1)  # [candidates, B, T]
        index = jnp.moveaxis(component, 0, -1)[..., None]  # [B, T, candidates, 1]
        mean, scale = jnp.take_along_axis(means, index, axis=-2), jnp.take_along_axis(scales, index, axis=-2)
        x = mean + settings.temperature * scale * noise.normal("value", mean.shape)
        if unguided is None:
            return x[..., 0, :]
        gain = (guidance_scale - 1) * (_log_density(mixture, x) - _log_density(self(unguided), x))
        best = (gain + noise.gumbel("candidate", gain.shape)).argmax(axis=-1)
        return jnp.take_along_axis(x, best[..., None, None], axis=-2)[..., 0, :]


def _log_density(mixture: tuple[Array, Array, Array], x: Array) -> Array:
    """Log densities [B, T, K] of x [B, T, K, C] under mixtures with M components."""
    log_weights, means, scales = (a[..., None, :] if i == 0 else a[..., None, :, :] for i, a in enumerate(mixture))
    deviation = (x[..., None, :] - means) / scales
    log_normal = -0.5 * jnp.square(deviation) - jnp.log(scales) - 0.5 * jnp.log(2 * jnp.pi)
    return jax.nn.logsumexp(log_weights + log_normal.sum(axis=-1), axis=-1)
