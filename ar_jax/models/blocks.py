"""Transformer blocks: a mixer and an MLP, each behind a norm, optionally modulated by a condition (adaLN)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.norms import NORMS, make_norm
from ar_jax.mixers.protocol import Mixer, State, Tokens
from ar_jax.models.dropout import Dropout

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,  # by tanh
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ADALN = ("none", "block", "shared")
MakeMixer = Callable[[], Mixer]


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What the blocks of a backbone have in common; keys of `config.model`.

    Attributes:
      mlp_dim: hidden width; None takes 4 embed_dim, or 8/3 embed_dim where gated (equal parameters).
      norm: a key of NORMS.
      norm_epsilon: added to the variance.
      last_norm: of the norm behind the last block, where it is another; "" takes the same.
      norm_first: pre-norm blocks, x + f(norm(x)); otherwise post-norm ones, norm(x + f(x)).
      activation: a key of ACTIVATIONS.
      gated: whether the MLPs are gated (arXiv:2002.05202).
      mlp_bias: whether the MLPs' projections have biases.
      adaln: the condition shifts, scales and gates mixer and MLP (DiT, arXiv:2212.09748): "none", "block": by a projection
        of each block, "shared": by one projection for all and a bias of each block (VAR, arXiv:2404.02905).
      dropout_rate: after the embedding, the mixers and the MLPs.
      remat: recompute each layer's activations in the backward pass.
      dtype: of the computation, "float32" or "bfloat16".
      param_dtype: of the parameters.

    Raises:
      UsageError: a value that no part takes.
    """

    mlp_dim: int | None = None
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    last_norm: str = ""
    norm_first: bool = True
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    adaln: str = "none"
    dropout_rate: float = 0.0
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the values before anything is traced."""
        tables: dict[str, Any] = {"norm": NORMS, "activation": ACTIVATIONS, "dtype": DTYPES, "param_dtype": DTYPES}
        for key, table in (tables | {"adaln": dict.fromkeys(ADALN), "last_norm": NORMS | {"": None}}).items():
            choose(table, getattr(self, key), f"model.{key}")
        if not 0 <= self.dropout_rate < 1:
            raise UsageError(f"config.model.dropout_rate={self.dropout_rate} must lie in [0, 1).")
        if self.mlp_dim is not None and self.mlp_dim < 1:
            raise UsageError(f"config.model.mlp_dim={self.mlp_dim} must be at least 1.")

    @property
    def types(self) -> dict[str, Any]:
        """The fields dtype and param_dtype of a Linen module."""
        return {"dtype": DTYPES[self.dtype], "param_dtype": DTYPES[self.param_dtype]}

    def make_norm(self, kind: str | None = None) -> Callable[..., Any]:
        """A constructor of these blocks' norm, or of another kind with the same epsilon."""
        return make_norm(kind or self.norm, self.norm_epsilon, **self.types)

    def hidden_dim(self, embed_dim: int) -> int:
        """The MLPs' hidden width."""
        return self.mlp_dim or (round(embed_dim * 8 / 3 / 8) * 8 if self.gated else 4 * embed_dim)


class MLP(nn.Module):
    """act(x W_1) W_2, or gated: (act(x W_g) * x W_1) W_2 (arXiv:2002.05202)."""

    options: BlockOptions

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, D] to [B, T, D]."""
        options, embed_dim = self.options, x.shape[-1]
        dense = functools.partial(Dense, use_bias=options.mlp_bias, **options.types)
        hidden = dense(options.hidden_dim(embed_dim), name="up")(x)
        act = ACTIVATIONS[options.activation]
        if options.gated:
            hidden = act(dense(options.hidden_dim(embed_dim), name="gate")(x)) * hidden
        else:
            hidden = act(hidden)
        return dense(embed_dim, name="down")(hidden)


class Modulation(nn.Module):
    """W silu(condition) + b, cut into shifts, scales and gates. Zeros at first: every block starts as the identity."""

    embed_dim: int
    count: int
    options: BlockOptions

    @nn.compact
    def __call__(self, vector: Array) -> Array:
        """Conditions [B, T or 1, D] to [B, T or 1, count embed_dim]."""
        zeros = nn.initializers.zeros
        return Dense(self.count * self.embed_dim, kernel_init=zeros, name="project", **self.options.types)(
            nn.silu(vector)
        )


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)); with adaLN a condition shifts, scales and gates both."""

    make_mixer: MakeMixer
    options: BlockOptions

    def setup(self) -> None:
        """Mixer, MLP, norms."""
        norm = self.options.make_norm()
        self.mixer = self.make_mixer()
        self.mlp = MLP(self.options)
        self.mixer_norm, self.mlp_norm = norm(), norm()
        self.dropout = Dropout(self.options.dropout_rate)

    @nn.compact
    def __call__(
        self, x: Array, tokens: Tokens, vector: Array | None, state: State | None, deterministic: bool
    ) -> tuple[Array, State | None]:
        """Tokens x [B, T, D] to x [B, T, D] and the mixer's state.

        Args:
          x: what came from the block before.
          tokens: when and where they are.
          vector: [B, T or 1, D] conditions; with adaln "shared" their projection, [B, T or 1, 6 D].
          state: the mixer's, or None for a whole sequence.
          deterministic: no dropout.
        """
        mix = functools.partial(self._mix, tokens=tokens, state=state, deterministic=deterministic)
        if not self.options.norm_first:
            mixed, state = mix(x)
            x = self.mixer_norm(x + mixed)
            return self.mlp_norm(x + self.dropout(self.mlp(x), deterministic=deterministic)), state
        if self.options.adaln == "none" or vector is None:
            mixed, state = mix(self.mixer_norm(x))
            x = x + mixed
            return x + self.dropout(self.mlp(self.mlp_norm(x)), deterministic=deterministic), state
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(self._modulation(vector), 6, axis=-1)
        mixed, state = mix(modulated(self.mixer_norm(x), shift_1, scale_1))
        x = x + gate_1 * mixed
        out = self.mlp(modulated(self.mlp_norm(x), shift_2, scale_2))
        return x + gate_2 * self.dropout(out, deterministic=deterministic), state

    def _mix(self, x: Array, tokens: Tokens, state: State | None, deterministic: bool) -> tuple[Array, State | None]:
        mixed, state = self.mixer(x, tokens, state)
        return self.dropout(mixed, deterministic=deterministic), state

    def _modulation(self, vector: Array) -> Array:
        """[B, T or 1, 6 D]."""
        if self.options.adaln == "block":
            width = vector.shape[-1]
            return Modulation(width, 6, self.options, name="modulation")(vector)
        bias = self.param(
            "modulation_bias", nn.initializers.zeros, (vector.shape[-1],), self.options.types["param_dtype"]
        )
        return vector + bias.astype(vector.dtype)[None, None]
