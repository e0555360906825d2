"""Transformer blocks: a mixer and an MLP, each behind a norm, optionally modulated by a condition (adaLN)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.dispatch import constrain
from ar_jax.mixers.norms import NORMS, make_norm
from ar_jax.mixers.protocol import Mixer, State, Tokens
from ar_jax.models.dropout import Dropout
from ar_jax.models.gru_gate import GRUGate

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,  # by tanh
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ADALN = ("none", "block", "shared")
RESIDUALS = ("add", "gru", "none")
MLPS = ("all", "last", "none")
# What the backward pass of a layer finds kept and need not compute again; the names are those of `jax.checkpoint_policies`.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # everything is kept
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # those with weights
}
MakeMixer = Callable[[], Mixer]


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What the blocks of a backbone have in common; keys of `config.model`.

    Attributes:
      mlps: which blocks of the mixers' pattern have an MLP: "all", the "last" one of each repeat, or "none".
      mlp_dim: hidden width; None takes 4 embed_dim, or 8/3 embed_dim where gated (equal parameters).
      norm: a key of NORMS.
      norm_epsilon: added to the variance.
      last_norm: of the norm behind the last block, where it is another; "" takes the same.
      norm_first: pre-norm blocks, x + f(norm(x)); otherwise post-norm ones, norm(x + f(x)).
      side_by_side: mixer and MLP read the same x: x + mixer(norm(x)) + mlp(norm'(x)) (GPT-NeoX, arXiv:2204.06745).
      residual: "add", or "gru": a gate lets in what mixer and MLP make, behind a relu (GTrXL, arXiv:1910.06764), or "none":
        mlp(norm(mixer(norm(x)))) (Terminator, arXiv:2401.17948).
      activation: a key of ACTIVATIONS.
      gated: whether the MLPs are gated (arXiv:2002.05202).
      mlp_bias: whether the MLPs' projections have biases.
      adaln: the condition shifts, scales and gates mixer and MLP (DiT, arXiv:2212.09748): "none", "block": by a projection
        of each block, "shared": by one projection for all and a bias of each block (VAR, arXiv:2404.02905).
      adaln_groups: where it is shared there are so many projections, and block i has number i mod so many (AiM,
        arXiv:2408.12245).
      dropout_rate: after the embedding, the mixers and the MLPs.
      remat: what each layer computes again in the backward pass rather than keeps, a key of REMAT: "none", "full" (all but
        its input), "dots" (all but matrix products), "dots_with_no_batch_dims" (all but products with weights).
      dtype: of the computation, "float32" or "bfloat16".
      param_dtype: of the parameters.

    Raises:
      UsageError: a value that no part takes.
    """

    mlps: str = "all"
    mlp_dim: int | None = None
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    last_norm: str = ""
    norm_first: bool = True
    side_by_side: bool = False
    residual: str = "add"
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    adaln: str = "none"
    adaln_groups: int = 1
    dropout_rate: float = 0.0
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the values before anything is traced."""
        tables: dict[str, Any] = {"norm": NORMS, "activation": ACTIVATIONS, "dtype": DTYPES, "param_dtype": DTYPES}
        tables |= {"adaln": dict.fromkeys(ADALN), "mlps": dict.fromkeys(MLPS), "residual": dict.fromkeys(RESIDUALS)}
        tables |= {"last_norm": NORMS | {"": None}, "remat": REMAT}
        for key, table in tables.items():
            choose(table, getattr(self, key), f"model.{key}")
        if not 0 <= self.dropout_rate < 1:
            raise UsageError(f"config.model.dropout_rate={self.dropout_rate} must lie in [0, 1).")
        if self.side_by_side and (self.adaln != "none" or not self.norm_first):
            raise UsageError(
                "config.model.side_by_side needs norm_first=True and adaln='none'; set them, or it to False."
            )
        if self.residual != "add" and (self.side_by_side or self.adaln != "none" or not self.norm_first):
            raise UsageError(
                f"config.model.residual={self.residual!r} needs norm_first=True, adaln='none' and no side_by_side; "
                "set them, or 'add'."
            )
        self._check_adaln()
        if self.mlp_dim is not None and self.mlp_dim < 1:
            raise UsageError(f"config.model.mlp_dim={self.mlp_dim} must be at least 1.")

    def _check_adaln(self) -> None:
        if self.adaln_groups < 1 or (self.adaln_groups > 1 and self.adaln != "shared"):
            raise UsageError(
                f"config.model.adaln_groups={self.adaln_groups} must be at least 1, and 1 unless adaln='shared'."
            )
        if self.adaln == "shared" and self.mlps == "last":
            raise UsageError("config.model.adaln='shared' needs blocks that are alike; set mlps to 'all' or 'none'.")
        if self.mlps != "all" and (not self.norm_first or self.residual == "gru"):
            raise UsageError(
                f"config.model.mlps={self.mlps!r} needs norm_first=True and no residual='gru'; set them, or mlps='all'."
            )

    @property
    def types(self) -> dict[str, Any]:
        """The fields dtype and param_dtype of a Linen module."""
        return {"dtype": DTYPES[self.dtype], "param_dtype": DTYPES[self.param_dtype]}

    def rematerialised(self, layer: type[nn.Module]) -> type[nn.Module]:
        """The class of a scan's body that keeps for the backward pass what `remat` says."""
        policy = REMAT[self.remat]
        return layer if policy is None else nn.remat(layer, prevent_cse=False, policy=policy)

    def make_norm(self, kind: str | None = None) -> Callable[..., Any]:
        """A constructor of these blocks' norm, or of another kind with the same epsilon."""
        return make_norm(kind or self.norm, self.norm_epsilon, **self.types)

    def has_mlp(self, number: int, count: int) -> bool:
        """Whether the block of this number in a pattern of so many has an MLP."""
        return self.mlps == "all" or (self.mlps == "last" and number == count - 1)

    def num_modulations(self, has_mlp: bool) -> int:
        """How many vectors adaLN gives a block."""
        return 6 if has_mlp else 3

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
    """x += mixer(norm(x)); x += mlp(norm(x)); with adaLN a condition shifts, scales and gates both.

    Attributes:
      make_mixer: makes the mixer.
      options: of all blocks.
      has_mlp: otherwise it ends behind the mixer; None takes what the options say of a block on its own.
    """

    make_mixer: MakeMixer
    options: BlockOptions
    has_mlp: bool | None = None

    @property
    def ends_in_mlp(self) -> bool:
        """Whether it has an MLP."""
        return self.options.has_mlp(0, 1) if self.has_mlp is None else self.has_mlp

    def setup(self) -> None:
        """Mixer, MLP, norms."""
        norm = self.options.make_norm()
        self.mixer, self.mixer_norm = self.make_mixer(), norm()
        if self.ends_in_mlp:
            self.mlp, self.mlp_norm = MLP(self.options), norm()
        self.dropout = Dropout(self.options.dropout_rate)
        if self.options.residual == "gru":
            self.mixer_gate, self.mlp_gate = (GRUGate(**self.options.types) for _ in range(2))

    @nn.compact
    def __call__(
        self, x: Array, tokens: Tokens, vector: Array | None, state: State | None, deterministic: bool
    ) -> tuple[Array, State | None]:
        """Tokens x [B, T, D] to x [B, T, D] and the mixer's state.

        Args:
          x: what came from the block before.
          tokens: when and where they are.
          vector: [B, T or 1, D] conditions; with adaln "shared" their projection, [B, T or 1, 6 D], or 3 D without
            an MLP.
          state: the mixer's, or None for a whole sequence.
          deterministic: no dropout.
        """
        x = constrain(x, ("batch", "sequence", None))
        mix = functools.partial(self._mix, tokens=tokens, state=state, deterministic=deterministic)
        if not self.options.norm_first:
            mixed, state = mix(x)
            x = self.mixer_norm(x + mixed)
            return self.mlp_norm(x + self.dropout(self.mlp(x), deterministic=deterministic)), state
        if self.options.residual == "none":
            x, state = mix(self.mixer_norm(x))
            return self.dropout(
                self.mlp(self.mlp_norm(x)), deterministic=deterministic
            ) if self.ends_in_mlp else x, state
        if self.options.residual == "gru":
            mixed, state = mix(self.mixer_norm(x))
            x = self.mixer_gate(x, nn.relu(mixed))
            made = self.dropout(self.mlp(self.mlp_norm(x)), deterministic=deterministic)
            return self.mlp_gate(x, nn.relu(made)), state
        if self.options.adaln == "none" or vector is None:
            mixed, state = mix(self.mixer_norm(x))
            if not self.ends_in_mlp:
                return x + mixed, state
            read = x if self.options.side_by_side else x + mixed
            return x + mixed + self.dropout(self.mlp(self.mlp_norm(read)), deterministic=deterministic), state
        count = self.options.num_modulations(self.ends_in_mlp)
        shift, scale, gate, *of_mlp = jnp.split(self._modulation(vector, count), count, axis=-1)
        mixed, state = mix(modulated(self.mixer_norm(x), shift, scale))
        x = x + gate * mixed
        if not self.ends_in_mlp:
            return x, state
        shift, scale, gate = of_mlp
        out = self.mlp(modulated(self.mlp_norm(x), shift, scale))
        return x + gate * self.dropout(out, deterministic=deterministic), state

    def _mix(self, x: Array, tokens: Tokens, state: State | None, deterministic: bool) -> tuple[Array, State | None]:
        mixed, state = self.mixer(x, tokens, state)
        return self.dropout(mixed, deterministic=deterministic), state

    def _modulation(self, vector: Array, count: int) -> Array:
        """[B, T or 1, count D]."""
        if self.options.adaln == "block":
            width = vector.shape[-1]
            return Modulation(width, count, self.options, name="modulation")(vector)
        bias = self.param(
            "modulation_bias", nn.initializers.zeros, (vector.shape[-1],), self.options.types["param_dtype"]
        )
        return vector + bias.astype(vector.dtype)[None, None]
