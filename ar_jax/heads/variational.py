"""Variational head: all tokens at once, through a latent per token that state spaces read (VSSM, arXiv:2407.08415)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.mixture import GaussianMixture
from ar_jax.heads.noise import Drawn, Noise
from ar_jax.heads.protocol import Sampling
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import NEVER, State, Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Decoder, mixer_pattern

LOG_SCALES = (-7.0, 4.0)  # of the posterior's and the prior's deviations: what is beyond is of no use but for overflow


@struct.dataclass
class VariationalState:
    """What is remembered of the tokens that are done, drawn or given.

    Attributes:
      encoder: of the network that reads tokens.
      decoder: of the network that reads latents.
      count: [] int32, how many tokens they are.
    """

    encoder: State
    decoder: State
    count: Array


class Variational(nn.Module):
    """p(x) = E_z prod_t p(x_t | z_<=t),   z_t ~ p(z_t) independent,   -log p(x) <= sum_t -log p(x_t | z_<=t) + KL_t.

    KL_t = KL(q(z_t | x_<=t) || p(z_t)), z drawn from q. Encoder q and decoder p(x_t | z_<=t) are stacks of mixers that read
    in one direction, such as state spaces, so training and generation are parallel over t: all latents are drawn at once and
    read by one scan (or Fourier transform), and no token waits for another. Both also read the model's hidden vectors: place
    and class of each token. As q reads no later tokens, the terms behind any k bound -log p(x_>k | x_<=k): tokens that are
    given have latents from q, the others from the prior, and the decoder goes on from its state behind the given ones
    (the autoregressive VSSM). Order and feed must ask for all tokens in one step.

    Attributes:
      embed_dim: of the hidden vectors, and the width of both stacks.
      vocab_size: of discrete tokens; 0 for continuous ones.
      channels: the size of continuous tokens.
      length: tokens at most.
      latent_dim: numbers of a latent, or variables of it.
      num_classes: a latent's variables are discrete, of so many classes, and gradients pass straight through the draw; 0 has
        normal ones.
      num_layers: of each stack.
      mixer: of the stacks; see `mixer_pattern`. None takes "gss", a diagonal state space that whole sequences take by
        Fourier transforms.
      mlp_dim: of the stacks; see BlockOptions.
      causal: q(z_t | x_<=t); otherwise q(z_t | x), by a third stack that reads from the end: a closer bound of log p(x), but
        nothing can be given.
      learned_prior: p(z_t) depends on the hidden vector of token t, which knows its place and class; otherwise it is
        the standard normal distribution, or uniform.
      num_components: of the Gaussian mixture that is p(x_t | z_<=t) of continuous tokens.
      kl_weight: of KL_t; below 1 the loss is no bound.
      free_nats: KL_t counts as so much at least (arXiv:1606.04934, sec. C.8); the loss is a bound all the same.

    Raises (in `check`):
      UsageError: sizes below 1, negative weights, or a mixer that reads later tokens.
    """

    embed_dim: int
    vocab_size: int = 0
    channels: int = 0
    length: int = 0
    latent_dim: int = 16
    num_classes: int = 0
    num_layers: int = 2
    mixer: Mapping[str, Any] | None = None
    mlp_dim: int | None = None
    causal: bool = True
    learned_prior: bool = False
    num_components: int = 1
    kl_weight: float = 1.0
    free_nats: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    has_likelihood: ClassVar[bool] = False
    draws_jointly: ClassVar[bool] = True

    @nn.nowrap
    def check(self) -> None:
        """Raises UsageError for values that no part takes; see the class."""
        for name, least in (("latent_dim", 1), ("num_layers", 1), ("num_components", 1), ("num_classes", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"config.head.{name}={getattr(self, name)} must be at least {least}.")
        for name in ("kl_weight", "free_nats"):
            if getattr(self, name) < 0:
                raise UsageError(f"config.head.{name}={getattr(self, name)} must be at least 0.")
        if not all(make().causal for make in self._mixers):
            raise UsageError(
                "config.head.mixer reads later tokens, too; take one that reads a sequence from its start."
            )
        if self.num_layers % len(self._mixers):
            raise UsageError(
                f"config.head.num_layers={self.num_layers} must be a multiple of the mixer pattern's {len(self._mixers)}."
            )

    @property
    def _types(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def _mixers(self) -> tuple[Any, ...]:
        """One repeat of the stacks' mixers, on a line of so many places."""
        size = max(self.length, 1)
        line = {"position_axes": 1, "grid": (size,), "num_rows": size, "num_prefix": 0}
        config = {"kind": "gss"} if self.mixer is None else dict(self.mixer)
        return mixer_pattern(config, embed_dim=self.embed_dim, **line, **self._types)

    @nn.nowrap
    def _stack(self) -> Decoder:
        kinds = {key: jnp.dtype(kind).name for key, kind in self._types.items()}
        return Decoder(self.embed_dim, self._mixers, BlockOptions(mlp_dim=self.mlp_dim, **kinds), self.num_layers)

    def setup(self) -> None:
        """The stacks, what embeds tokens and latents, and the distributions."""
        dense = functools.partial(Dense, **self._types)
        small = nn.initializers.normal(0.02)
        self.embed: Any = (
            nn.Embed(self.vocab_size, self.embed_dim, embedding_init=small, **self._types)
            if self.vocab_size
            else dense(self.embed_dim)
        )
        self.encoder, self.decoder, self.embed_latent = self._stack(), self._stack(), dense(self.embed_dim)
        if not self.causal:
            self.encoder_from_end = self._stack()
        numbers = self.latent_dim * (self.num_classes or 2)
        self.posterior = dense(numbers, kernel_init=small)  # near the prior at first
        if self.learned_prior:
            self.prior = dense(numbers, kernel_init=small)
        self.observed: Any = (
            Categorical(self.vocab_size, **self._types)
            if self.vocab_size
            else GaussianMixture(self.channels, self.num_components, **self._types)
        )

    @nn.nowrap
    def init_state(self, batch_size: int) -> VariationalState:
        """The state before the first token; see `read` and `extend`."""
        size = max(self.length, 1)
        encoder, decoder = (self._stack().init_state(batch_size, size, size) for _ in range(2))
        return VariationalState(encoder, decoder, jnp.int32(0))

    def loss(
        self, hidden: Array, target: Array, key: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Array:
        """-log p(x_t | z_<=t) + kl_weight max(KL_t, free_nats) in nats, [B, T]; see Head. The key draws the latents.

        Args:
          hidden: [B, T, D], of all tokens.
          target: [B, T] int32 or [B, T, C].
          key: as said.
          label_smoothing: see Categorical.
          z_loss: see Categorical.
        """
        beliefs, priors = self._posterior(hidden, target)[0], self._prior(hidden)
        latents = self._drawn(beliefs, Drawn(key))
        read, _ = self.decode(latents, hidden)
        distance = jnp.maximum(self._divergence(beliefs, priors), self.free_nats)
        told = self.observed.loss(read, target, key, label_smoothing=label_smoothing, z_loss=z_loss)
        return told + self.kl_weight * distance

    def log_prob(self, hidden: Array, target: Array) -> Array:
        """Only a bound is known.

        Raises:
          UsageError: always.
        """
        raise UsageError("Head 'variational' has no exact log-likelihood; its loss is a bound, in nats per token.")

    def sample(
        self,
        hidden: Array,
        noise: Noise,
        settings: Sampling,
        unguided: Array | None = None,
        guidance_scale: Array | float = 1.0,
        given: tuple[Array, Array] | None = None,
    ) -> Array:
        """See Head. Temperature and filters are those of p(x_t | z_<=t).

        Args:
          hidden: [B, T, D], of all tokens.
          noise: "latent", and what the distribution of tokens draws from.
          settings: see Head.
          unguided: hidden vectors without the condition; they decode the same latents.
          guidance_scale: see Head.
          given: tokens [B, T, ...] and where they are given, [B, T] bool, a beginning of the sequence; where not, what stands
            there is not read. Given tokens are returned as they are.

        Raises:
          UsageError: tokens are given, but the encoder reads later tokens, too.
        """
        beliefs = self._prior(hidden)
        if given is not None:
            known = given[1][..., None, None]
            beliefs = jnp.where(known, self._posterior(hidden, given[0], known=given[1])[0], beliefs)
        latents = self._drawn(beliefs, noise)
        read, _ = self.decode(latents, hidden)
        steered = () if unguided is None else (self.decode(latents, unguided)[0], guidance_scale)
        drawn = self.observed.sample(read, noise, settings, *steered)
        if given is None:
            return drawn
        known = given[1].reshape(*given[1].shape, *[1] * (drawn.ndim - 2))
        return jnp.where(known, given[0].astype(drawn.dtype), drawn)

    def read(self, hidden: Array, given: Array, noise: Noise, state: VariationalState) -> VariationalState:
        """The state behind given tokens [B, T, ...], whose latents come from q; a sequence may be read in any pieces."""
        beliefs, encoder = self._posterior(hidden, given, state)
        _, decoder = self.decode(self._drawn(beliefs, noise), hidden, state)
        return VariationalState(encoder, decoder, state.count + hidden.shape[1])

    def extend(
        self, hidden: Array, noise: Noise, settings: Sampling, state: VariationalState
    ) -> tuple[Array, VariationalState]:
        """The next tokens [B, T, ...] behind a state, all at once or one by one with the same numbers, and the state after.

        Args:
          hidden: [B, T, D], of these tokens.
          noise: see `sample`.
          settings: see Head.
          state: of `init_state`, `read`, or this.
        """
        read, decoder = self.decode(self._drawn(self._prior(hidden), noise), hidden, state)
        drawn = self.observed.sample(read, noise, settings)
        _, encoder = self._posterior(hidden, drawn, state)
        return drawn, VariationalState(encoder, decoder, state.count + hidden.shape[1])

    def decode(
        self, latents: Array, hidden: Array, state: VariationalState | None = None
    ) -> tuple[Array, State | None]:
        """What tokens read of latents [B, T, latent_dim, 1 or classes] up to their own: [B, T, D], and the decoder's state."""
        x = self.embed_latent(latents.reshape(*latents.shape[:2], -1)) + hidden
        return self.decoder(x, _line(x, state), None, None if state is None else state.decoder)

    def _posterior(
        self, hidden: Array, target: Array, state: VariationalState | None = None, known: Array | None = None
    ) -> tuple[Array, State | None]:
        """Parameters of q, [B, T, latent_dim, 2 or classes], and the encoder's state; of tokens, or of the known ones."""
        if not self.causal and (state is not None or known is not None):
            raise UsageError(
                "config.head.causal=False reads whole sequences, so no tokens can be given; set it to True."
            )
        x = self.embed(target).astype(hidden.dtype) + hidden
        tokens: Any = _line(x, state)
        if known is not None:
            tokens = tokens.replace(step=jnp.where(known, tokens.step, NEVER), padded=True)
        out, after = self.encoder(x, tokens, None, None if state is None else state.encoder)
        if not self.causal:
            out = out + self.encoder_from_end(x[:, ::-1], tokens)[0][:, ::-1]
        return self._split(self.posterior(out)), after

    def _prior(self, hidden: Array) -> Array:
        """Parameters of p(z_t), as q's."""
        if self.learned_prior:
            return self._split(self.prior(hidden))
        return jnp.zeros((*hidden.shape[:2], self.latent_dim, self.num_classes or 2))

    def _split(self, numbers: Array) -> Array:
        return numbers.astype(jnp.float32).reshape(*numbers.shape[:2], self.latent_dim, -1)

    def _drawn(self, beliefs: Array, noise: Noise) -> Array:
        """Latents [B, T, latent_dim, 1 or classes] by the noise "latent"."""
        if not self.num_classes:
            mean, log_scale = _mean_and_log_scale(beliefs)
            return (mean + jnp.exp(log_scale) * noise.normal("latent", mean.shape))[..., None]
        picked = jax.nn.one_hot(noise.categorical("latent", beliefs), self.num_classes)
        shares = jax.nn.softmax(beliefs)
        return picked + shares - jax.lax.stop_gradient(shares)

    def _divergence(self, beliefs: Array, priors: Array) -> Array:
        """KL(q || p) in nats, [B, T]."""
        if self.num_classes:
            log_q, log_p = jax.nn.log_softmax(beliefs), jax.nn.log_softmax(priors)
            return (jnp.exp(log_q) * (log_q - log_p)).sum(axis=(-2, -1))
        (mean, log_scale), (other, log_other) = map(_mean_and_log_scale, (beliefs, priors))
        spread = jnp.exp(2 * (log_scale - log_other)) + jnp.square((mean - other) * jnp.exp(-log_other))
        return (0.5 * (spread - 1) - log_scale + log_other).sum(axis=-1)


def _mean_and_log_scale(beliefs: Array) -> tuple[Array, Array]:
    return beliefs[..., 0], jnp.clip(beliefs[..., 1], *LOG_SCALES)


def _line(x: Array, state: VariationalState | None) -> Tokens:
    """The tokens of a line, one after the other, that goes on where the state ends."""
    step = jnp.arange(x.shape[1], dtype=jnp.int32)[None] + (0 if state is None else state.count)
    return Tokens(step, step[..., None], x.shape[1], row=step)
