"""A tokenizer in training, and what one can do with it afterwards: the counterpart of `system.System` and `run.Run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from ar_jax.config import UsageError, build, check_keys
from ar_jax.data.protocol import Facts
from ar_jax.objectives.reconstruction import Reconstruction
from ar_jax.system import as_rows, compiled
from ar_jax.tokenizers import TOKENIZERS
from ar_jax.tokenizers.learned import LearnedTokenizer
from ar_jax.trained import Trained

Params = Any
KIND = "reconstruction"
SECTIONS = ("seed", "data", "tokenizer", "objective", "optimizer", "schedule", "train", "checkpoint", "eval", "mesh")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizerSystem:
    """A tokenizer and its objective, a `Task` of the trainer.

    Parameters are {"tokenizer": its own, "discriminator": that of the objective, if it has one}.

    Attributes:
      facts: what the data is.
      tokenizer: what is trained.
      objective: the loss.
    """

    facts: Facts
    tokenizer: LearnedTokenizer
    objective: Reconstruction

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        tokenizer_key, other_key = jax.random.split(key)
        return {"tokenizer": self.tokenizer.init(tokenizer_key)} | self.objective.init(other_key, self.facts.shape)

    def frozen(self, name: str) -> bool:
        """See Task: running means are no matter of gradients."""
        return name.removeprefix("tokenizer/") in self.tokenizer.gradient_free

    def measured(self, name: str) -> bool:
        """See Task: the loss replaces them itself."""
        return False

    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Array, progress: Array
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """See Task and `Reconstruction`."""
        return self.objective(self.tokenizer, params, batch["image"], key, progress)

    def encode(self, params: Params, images: Array) -> Array:
        """Images [B, H, W, C] to tokens, [B, L] int32 or [B, L, channels]."""
        return self.tokenizer.encode(params["tokenizer"], images)

    def decode(self, params: Params, tokens: Array) -> Array:
        """Tokens to images [B, H, W, C] in [-1, 1]."""
        return self.tokenizer.decode(params["tokenizer"], tokens)

    def describe(self) -> dict[str, str]:
        """What a run says of the tokenizer at its start. Files that the loss needs are read here, before anything else."""
        grids, kind = " + ".join("x".join(map(str, grid)) for grid in self.tokenizer.layout), self.tokenizer.vocab_size
        lines = {
            "tokens per image": f"{grids} {f'of {kind} codes' if kind else f'x {self.tokenizer.channels} numbers'}"
        }
        if self.objective.perceptual_weight:
            stages = len(self.objective.features.stages)
            lines["perceptual features"] = f"{self.objective.perceptual_features}, {stages} stages"
        return lines


class TokenizerRun(Trained[TokenizerSystem]):
    """A tokenizer with parameters."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images [B, H, W, C] in [-1, 1] to tokens on their slots: [B, L] int32, or [B, L, channels] float32.

        Raises:
          UsageError: images of another shape.
        """
        if np.shape(images)[1:] != tuple(self.system.facts.shape):
            shape = ", ".join(map(str, self.system.facts.shape))
            raise UsageError(f"images have shape {np.shape(images)}, but this tokenizer takes [B, {shape}].")
        return np.asarray(compiled(self.system.encode)(self.params, as_rows(images)))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens to images [B, H, W, C] in [-1, 1].

        Raises:
          UsageError: tokens of another shape, or codes that do not exist.
        """
        tokenizer = self.system.tokenizer
        length = sum(int(np.prod(grid)) for grid in tokenizer.layout)
        wanted = (length,) if tokenizer.vocab_size else (length, tokenizer.channels)
        tokens = np.asarray(tokens, np.int32 if tokenizer.vocab_size else np.float32)
        if tokens.shape[1:] != wanted:
            shape = ", ".join(map(str, wanted))
            raise UsageError(f"tokens have shape {tokens.shape}, but this tokenizer's are [B, {shape}].")
        if tokenizer.vocab_size and tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
            raise UsageError(f"tokens must lie between 0 and {tokenizer.vocab_size - 1}.")
        return np.asarray(compiled(self.system.decode)(self.params, tokens))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Images through their tokens and back, [B, H, W, C] in [-1, 1]."""
        return self.decode(self.encode(images))


def tokenizer_from_config(config: Mapping[str, Any], facts: Facts) -> TokenizerSystem:
    """Builds and checks tokenizer and objective; nothing is allocated or compiled.

    Args:
      config: see configs/tokenizers/vqgan.py.
      facts: what the data is.

    Raises:
      UsageError: an unknown key or kind, a section that has no meaning here, or a tokenizer that is not learned.
    """
    check_keys(config, SECTIONS, "")
    if facts.modality != "image":
        raise UsageError(f"config.objective.kind={KIND!r} is for images, but the data is {facts.modality}.")
    tokenizer = build(TOKENIZERS, config["tokenizer"], "tokenizer", shape=facts.shape, data_levels=facts.levels)
    if not isinstance(tokenizer, LearnedTokenizer):
        raise UsageError(
            f"config.tokenizer.kind={config['tokenizer']['kind']!r} learns nothing; use 'autoencoder' or 'titok', or "
            "another config.objective.kind."
        )
    objective = build({KIND: Reconstruction}, config["objective"], "objective")
    return TokenizerSystem(facts, tokenizer, objective)
