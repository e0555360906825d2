"""Reconstruction: what trains a tokenizer of images (VQGAN, arXiv:2012.09841; its networks and quantizers lie in tokenizers/).

loss = l1 |x - y| + l2 (x - y)^2 + perceptual d(x, y) + quantizer's losses + lambda adversarial -D(y),  with a discriminator
D that learns to tell the images x from the reconstructions y in the same step.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, build, choose
from ar_jax.tokenizers.discriminator import DISCRIMINATOR_LOSSES, DISCRIMINATORS, GENERATOR_LOSSES
from ar_jax.tokenizers.learned import LearnedTokenizer
from ar_jax.tokenizers.learned import Reconstruction as Made
from ar_jax.tokenizers.perceptual import RANDOM, FeatureNetwork, random_network, read_network

Params = Any
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """The loss of a learned tokenizer, and of its discriminator where there is one.

    Attributes:
      l1_weight: of the mean absolute difference of values in [-1, 1].
      l2_weight: of the mean squared difference.
      perceptual_weight: of the perceptual distance; 0 leaves it out.
      perceptual_features: "random", or a safetensors file of a classifier; see `ar_jax.tokenizers.perceptual`.
      perceptual_weights: a safetensors file with the weights of its channels, "" for 1 each.
      adversarial_weight: of the adversarial loss; 0 has no discriminator.
      adversarial_start: the part of the training that is done before the discriminator is trained and heard.
      adaptive: multiply the adversarial loss by lambda (eq. 7); see `adaptive_weight`.
      discriminator: `kind`, a key of DISCRIMINATORS, and its fields; None takes kind "patch".
      discriminator_loss: "hinge" or "vanilla".
      generator_loss: what fools it, "linear" or "non_saturating".

    Raises:
      UsageError: a negative weight, a name that is unknown, or nothing that compares images.
    """

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual_features: str = RANDOM
    perceptual_weights: str = ""
    adversarial_weight: float = 0.0
    adversarial_start: float = 0.0
    adaptive: bool = True
    discriminator: Mapping[str, Any] | None = None
    discriminator_loss: str = "hinge"
    generator_loss: str = "linear"

    def __post_init__(self) -> None:
        """Checks the values before anything is traced."""
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "adversarial_weight", "adversarial_start"):
            if getattr(self, name) < 0:
                raise UsageError(f"config.objective.{name}={getattr(self, name)} must be at least 0.")
        if not self.l1_weight + self.l2_weight + self.perceptual_weight:
            raise UsageError("config.objective compares no images; set l1_weight or l2_weight above 0.")
        choose(DISCRIMINATOR_LOSSES, self.discriminator_loss, "objective.discriminator_loss")
        choose(GENERATOR_LOSSES, self.generator_loss, "objective.generator_loss")
        build(DISCRIMINATORS, self._discriminator_config, "objective.discriminator")

    @functools.cached_property
    def features(self) -> FeatureNetwork:
        """The network of the perceptual distance. Its weights are constants of the program, no parameters of a run."""
        if self.perceptual_features == RANDOM:
            return random_network()
        return read_network(self.perceptual_features, self.perceptual_weights)

    def init(self, key: Array, shape: tuple[int, ...]) -> Params:
        """Fresh parameters beside the tokenizer's: the discriminator's of images (H, W, C), or none."""
        if not self.adversarial_weight:
            return {}
        return {"discriminator": self._network.init(key, jnp.zeros((1, *shape)))["params"]}

    def __call__(
        self, tokenizer: LearnedTokenizer, params: Params, images: Array, key: Array, progress: Array
    ) -> tuple[Array, Metrics, dict[str, Array]]:
        """The loss of images [B, H, W, C], scalars to log, and new values of what the tokenizer keeps without gradients.

        Args:
          tokenizer: what is trained.
          params: {"tokenizer": its parameters} and what `init` gave.
          images: in [-1, 1].
          key: draws latents from their posterior, and codes anew.
          progress: [] float32 in [0, 1), the part of the training that is done.
        """
        draw_key, update_key = jax.random.split(key)
        made = tokenizer.reconstruct(params["tokenizer"], images, draw_key)
        # Both losses are differentiated by the images alone, once. Their gradients are compared (lambda), summed up, and
        # sent through the tokenizer by a term that is 0 and has just that gradient. So nothing but the tokenizer is trained
        # by them: the discriminator is fixed here.
        shown = jax.lax.stop_gradient(made.images)
        (loss, metrics), pull = jax.value_and_grad(self.similarity, has_aux=True)(shown, images)
        if self.adversarial_weight:
            heard = (progress >= self.adversarial_start).astype(jnp.float32)
            fooling, pull_fooling = jax.value_and_grad(self._fooling, argnums=1)(
                jax.lax.stop_gradient(params["discriminator"]), shown
            )
            weight = heard * self.adversarial_weight
            if self.adaptive:
                weight *= adaptive_weight(tokenizer, params["tokenizer"], made, pull, pull_fooling)
            loss, pull = loss + weight * fooling, pull + weight * pull_fooling
            # The discriminator sees reconstructions that are fixed: nothing but it is trained by its own loss.
            telling = self._telling(params["discriminator"], images, shown)
            metrics |= {"adversarial": fooling, "adversarial_weight": weight, "discriminator": telling}
            loss += heard * telling
        loss += jnp.sum(pull * (made.images - shown)) + sum(made.losses.values(), jnp.zeros(()))
        metrics |= dict(made.losses)
        if made.codes is not None:
            metrics |= code_metrics(made.codes, tokenizer.vocab_size)
        replaced = tokenizer.update_codebook(params["tokenizer"], made, update_key)
        return loss, metrics, {f"tokenizer/{name}": leaf for name, leaf in replaced.items()}

    def similarity(self, made: Array, images: Array) -> tuple[Array, Metrics]:
        """The weighted sum of what compares reconstructions with their images, and its parts unweighted."""
        parts = {"l1": jnp.abs(made - images).mean(), "l2": jnp.square(made - images).mean()}
        loss = self.l1_weight * parts["l1"] + self.l2_weight * parts["l2"]
        if self.perceptual_weight:
            parts["perceptual"] = self.features.distance(made, images).mean()
            loss += self.perceptual_weight * parts["perceptual"]
        return loss, parts

    def _fooling(self, params: Params, made: Array) -> Array:
        return GENERATOR_LOSSES[self.generator_loss](self._logits(params, made))

    def _telling(self, params: Params, real: Array, made: Array) -> Array:
        logits = self._logits(params, jnp.concatenate([real, made]))
        return DISCRIMINATOR_LOSSES[self.discriminator_loss](logits[: len(real)], logits[len(real) :])

    def _logits(self, params: Params, images: Array) -> Any:
        return self._network.apply({"params": params}, images)

    @property
    def _discriminator_config(self) -> dict[str, Any]:
        return {"kind": "patch"} | dict(self.discriminator or {})

    @property
    def _network(self) -> nn.Module:
        return build(DISCRIMINATORS, self._discriminator_config, "objective.discriminator")


def adaptive_weight(tokenizer: LearnedTokenizer, params: Params, made: Made, pull: Array, other: Array) -> Array:
    """lambda = |grad of the similarity| / (|grad of the adversarial loss| + 1e-6), at most 1e4 (arXiv:2012.09841, eq. 7).

    Args:
      tokenizer: the gradients are by the kernel of its decoder's last layer.
      params: of the tokenizer.
      made: its reconstruction.
      pull: [B, H, W, C], gradient of the similarity by the reconstructed images.
      other: that of the adversarial loss.
    """
    params, features = jax.lax.stop_gradient((params, made.features))
    _, back = jax.vjp(lambda p: tokenizer.decode_last(p, features), params)
    norms = [
        jnp.linalg.norm(functools.reduce(operator.getitem, tokenizer.last_layer.split("/"), back(g)[0]).ravel())
        for g in (pull, other)
    ]
    return jnp.clip(norms[0] / (norms[1] + 1e-6), 0.0, 1e4)


def code_metrics(codes: Array, vocab_size: int) -> Metrics:
    """How a batch uses the codes [B, L]: the fraction that occurs, and the perplexity, exp(entropy), of their shares."""
    shares = jnp.bincount(codes.reshape(-1), length=vocab_size) / codes.size
    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-12)))
    return {"codebook_usage": (shares > 0).mean(), "perplexity": jnp.exp(entropy)}
