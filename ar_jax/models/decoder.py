"""The decoder: pre-norm blocks of any mixers, scanned over layers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, build, choose
from ar_jax.kernels.dense import Dense
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Mixer, State, Tokens
from ar_jax.models.dropout import Dropout

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
ACTIVATIONS = {"silu": nn.silu, "gelu": nn.gelu, "relu": nn.relu, "relu2": lambda x: jnp.square(nn.relu(x))}
MakeMixer = Callable[[], Mixer]


def mixer_pattern(config: Mapping[str, Any], **given: Any) -> tuple[MakeMixer, ...]:
    """The mixers of one repeat of the layers, from a kind such as "softmax" or "3 linear : 1 softmax".

    Args:
      config: `kind`; options that all its kinds share; and under a kind's own name a mapping of options for it alone.
      **given: fields that the code supplies.

    Raises:
      UsageError: an unknown kind or option, or a pattern that cannot be read.
    """
    shared = {k: v for k, v in config.items() if k != "kind" and not isinstance(v, Mapping)}
    own = {k: v for k, v in config.items() if isinstance(v, Mapping)}
    kinds: list[str] = []
    for term in str(config.get("kind", "")).split(":"):
        count, kind = re.fullmatch(r"\s*(\d*)\s*(.*?)\s*", term, re.DOTALL).groups()  # type: ignore[union-attr]  # matches anything
        kinds += [kind] * int(count or 1)
    if not kinds:
        raise UsageError(
            f"config.model.mixer.kind={config.get('kind')!r} names no mixer; use one of {', '.join(MIXERS)}."
        )
    for name in own:
        choose(MIXERS, name, "model.mixer.kind")
    options = [{"kind": kind} | shared | dict(own.get(kind, {})) for kind in kinds]
    makers = [functools.partial(build, MIXERS, option, "model.mixer", **given) for option in options]
    for make in makers:
        make()  # a wrong option is told now, not while tracing
    return tuple(makers)


class MLP(nn.Module):
    """act(x W_1) W_2, or gated: (act(x W_g) * x W_1) W_2 (arXiv:2002.05202)."""

    mlp_dim: int
    activation: str
    gated: bool
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, D] to [B, T, D]."""
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = dense(self.mlp_dim, name="up")(x)
        act = choose(ACTIVATIONS, self.activation, "model.activation")
        hidden = act(dense(self.mlp_dim, name="gate")(x)) * hidden if self.gated else act(hidden)
        return dense(x.shape[-1], name="down")(hidden)


class Block(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)); with adaLN a vector shifts, scales and gates both (DiT, arXiv:2212.09748)."""

    make_mixer: MakeMixer
    mlp_dim: int
    norm: str
    activation: str
    gated: bool
    adaln: bool
    dropout_rate: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self) -> None:
        """Mixer, MLP, norms."""
        norm = functools.partial(choose(NORMS, self.norm, "model.norm"), dtype=self.dtype, param_dtype=self.param_dtype)
        self.mixer = self.make_mixer()
        self.mlp = MLP(self.mlp_dim, self.activation, self.gated, self.dtype, self.param_dtype)
        self.mixer_norm, self.mlp_norm = norm(), norm()
        self.dropout = Dropout(self.dropout_rate)

    @nn.compact
    def __call__(
        self, x: Array, tokens: Tokens, vector: Array | None, state: State | None, deterministic: bool
    ) -> tuple[Array, State | None]:
        """x [B, T, D], vector [B, D] to x [B, T, D] and the mixer's state."""
        if self.adaln and vector is not None:
            zeros = nn.initializers.zeros  # every block starts as the identity
            modulation = nn.Dense(
                6 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, param_dtype=self.param_dtype, name="modulation"
            )
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(
                modulation(nn.silu(vector))[:, None], 6, axis=-1
            )
        else:
            shift_1 = scale_1 = shift_2 = scale_2 = jnp.zeros((1, 1, 1), x.dtype)
            gate_1 = gate_2 = jnp.ones((1, 1, 1), x.dtype)
        mixed, state = self.mixer(self.mixer_norm(x) * (1 + scale_1) + shift_1, tokens, state)
        x = x + gate_1 * self.dropout(mixed, deterministic=deterministic)
        out = self.mlp(self.mlp_norm(x) * (1 + scale_2) + shift_2)
        return x + gate_2 * self.dropout(out, deterministic=deterministic), state


class Repeat(nn.Module):
    """One repeat of the pattern of blocks: the body of the scan over layers."""

    blocks: tuple[Callable[..., Block], ...]
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Array, state: State | None, tokens: Tokens, vector: Array | None
    ) -> tuple[Array, State | None]:
        """The scan's carry is x, what it scans over is the state."""
        after = []
        for i, make in enumerate(self.blocks):
            x, new = make(name=f"block_{i}")(x, tokens, vector, None if state is None else state[i], self.deterministic)
            after.append(new)
        return x, None if state is None else tuple(after)


class Decoder(nn.Module):
    """A stack of blocks, `num_layers` deep, whose mixers repeat a pattern.

    Attributes:
      mixers: makes each mixer of one repeat; see `mixer_pattern`.
      mlp_dim: hidden width; None takes 4 embed_dim, or 8/3 embed_dim where gated (equal parameters).
      norm: "rms" or "layer".
      remat: recompute each repeat's activations in the backward pass.
    """

    mixers: tuple[MakeMixer, ...]
    embed_dim: int
    num_layers: int
    mlp_dim: int | None = None
    norm: str = "rms"
    activation: str = "silu"
    gated: bool = True
    adaln: bool = False
    dropout_rate: float = 0.0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def num_repeats(self) -> int:
        """How often the pattern fits the layers."""
        if self.num_layers < 1 or self.num_layers % len(self.mixers):
            raise UsageError(
                f"config.model.num_layers={self.num_layers} must be a multiple of the mixer pattern's {len(self.mixers)}."
            )
        return self.num_layers // len(self.mixers)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> State:
        """The state of all layers: leading axis num_repeats, one entry per mixer of the pattern."""
        one = tuple(make().init_state(batch_size, max_len, max_step_len) for make in self.mixers)
        return jax.tree.map(lambda a: jnp.tile(a[None], (self.num_repeats, *[1] * a.ndim)), one)

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: State | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, State | None]:
        """Hidden vectors after the final norm.

        Args:
          x: [B, T, D] embeddings.
          tokens: when and where they are.
          vector: [B, D], the condition of adaLN.
          state: what was remembered before these tokens; None for a whole sequence.
          deterministic: no dropout.

        Returns:
          [B, T, D], and the state after these tokens (None if none was given).
        """
        hidden = self.mlp_dim or (round(self.embed_dim * 8 / 3 / 8) * 8 if self.gated else 4 * self.embed_dim)
        options = (
            hidden,
            self.norm,
            self.activation,
            self.gated,
            self.adaln,
            self.dropout_rate,
            self.dtype,
            self.param_dtype,
        )
        blocks = tuple(functools.partial(Block, make, *options) for make in self.mixers)
        body = nn.remat(Repeat, prevent_cse=False) if self.remat else Repeat
        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.num_repeats,
        )
        x, state = scan(blocks, deterministic, name="layers")(x.astype(self.dtype), state, tokens, vector)
        norm = choose(NORMS, self.norm, "model.norm")(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        return norm(x), state
