"""The decoder-only generator, from config values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ar_jax.config import UsageError, choose
from ar_jax.models.decoder import ACTIVATIONS, NORMS, Decoder, mixer_pattern
from ar_jax.models.generator import Generator

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CONDITIONING = ("prefix", "adaln")


def decoder_only(
    head: nn.Module,
    condition: nn.Module,
    position: tuple[tuple[int, ...], ...],
    vocab_size: int,
    channels: int,
    embed_dim: int = 128,
    num_layers: int = 4,
    mixer: Mapping[str, Any] | None = None,
    mlp_dim: int | None = None,
    norm: str = "rms",
    activation: str = "silu",
    gated: bool = True,
    conditioning: str = "prefix",
    dropout_rate: float = 0.0,
    remat: bool = False,
    learned_positions: bool = True,
    target_positions: bool = True,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Generator:
    """A generator with one stack of blocks.

    Args:
      head: the head.
      condition: the conditioner.
      position: [L] coordinates of the slots.
      vocab_size: see Generator.
      channels: see Generator.
      embed_dim: width.
      num_layers: depth.
      mixer: see `mixer_pattern`.
      mlp_dim: see Decoder; so norm, activation, gated, dropout_rate and remat.
      norm: "rms" or "layer".
      activation: a key of ACTIVATIONS.
      gated: whether the MLPs are gated.
      conditioning: "prefix" puts the condition in front of the tokens, "adaln" also modulates every block with it.
      dropout_rate: after the embedding, the mixers and the MLPs.
      remat: see Decoder.
      learned_positions: see Generator.
      target_positions: see Generator.
      dtype: of the computation, "float32" or "bfloat16".
      param_dtype: of the parameters.

    Raises:
      UsageError: a value that no part takes.
    """
    choose(NORMS, norm, "model.norm"), choose(ACTIVATIONS, activation, "model.activation")
    if conditioning not in CONDITIONING:
        raise UsageError(
            f"config.model.conditioning={conditioning!r} is unknown; use one of {', '.join(CONDITIONING)}."
        )
    for key, value in (("embed_dim", embed_dim), ("num_layers", num_layers)):
        if value < 1:
            raise UsageError(f"config.model.{key}={value} must be at least 1.")
    if not 0 <= dropout_rate < 1:
        raise UsageError(f"config.model.dropout_rate={dropout_rate} must lie in [0, 1).")
    types: dict[str, Any] = {
        "dtype": choose(DTYPES, dtype, "model.dtype"),
        "param_dtype": choose(DTYPES, param_dtype, "model.param_dtype"),
    }
    fields = {"embed_dim": embed_dim, "position_axes": len(position[0])} | types
    decoder = Decoder(
        mixer_pattern(mixer or {"kind": "softmax"}, **fields),
        embed_dim,
        num_layers,
        mlp_dim,
        norm,
        activation,
        gated,
        conditioning == "adaln",
        dropout_rate,
        remat,
        **types,
    )
    decoder.num_repeats  # noqa: B018  (a depth that the pattern does not fit is told now)
    return Generator(
        decoder=decoder,
        head=head,
        condition=condition,
        position=position,
        embed_dim=embed_dim,
        vocab_size=vocab_size,
        channels=channels,
        learned_positions=learned_positions,
        target_positions=target_positions,
        dropout_rate=dropout_rate,
        **types,
    )
