"""An agent: observations, read by any mixers, give an action's logits and a value (AGaLiTe's, arXiv:2310.15719)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.environments.protocol import Environment
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import State, Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack, make_stack


class Agent(nn.Module):
    """An observation is a token: embedding, blocks, and for policy and value a hidden layer each.

    Blocks whose residuals add up have a norm behind them; gates keep the stream in bounds themselves.

    Attributes:
      stack: the blocks.
      embed_dim: their width.
      num_actions: that the policy chooses from.
      hidden_dim: of the layers before logits and value.
    """

    stack: Stack
    embed_dim: int
    num_actions: int
    hidden_dim: int

    @nn.nowrap
    def init_state(self, max_len: int) -> State:
        """The memory of one agent at an episode's start."""
        return self.stack.init_state(1, max_len, 1)

    @nn.compact
    def __call__(
        self, observations: Array, time: Array, episode: Array | None = None, state: State | None = None
    ) -> tuple[Array, Array, State | None]:
        """Logits [B, T, actions] and values [B, T], float32, and the memory after them where one is given.

        Args:
          observations: [B, T, F].
          time: [B, T] int32, since the episode began.
          episode: [B, T] int32, observations of different ones do not read each other; None where there is one.
          state: the memory, or None for whole episodes.
        """
        options = self.stack.options
        dense = functools.partial(Dense, kernel_init=nn.initializers.orthogonal(math.sqrt(2)), **options.types)
        tokens = Tokens(time, time[..., None], time.shape[1], row=time, segment=episode)
        x = nn.relu(dense(self.embed_dim, name="embed")(observations))
        x, state = self.stack(x, tokens, state=state)
        if options.residual == "add" and options.norm_first:
            x = options.make_norm(options.last_norm)(name="norm")(x)
        outputs = []
        for name, width in (("policy", self.num_actions), ("value", 1)):
            hidden = nn.tanh(dense(self.hidden_dim, name=f"{name}_hidden")(x))
            outputs.append(dense(width, name=name)(hidden).astype(jnp.float32))
        return outputs[0], outputs[1][..., 0], state


def agent(
    environment: Environment,
    options: BlockOptions,
    embed_dim: int = 128,
    num_layers: int = 4,
    hidden_dim: int = 128,
    mixer: Mapping[str, Any] | None = None,
) -> Agent:
    """The agent for an environment.

    Args:
      environment: what it acts in; no episode is longer than its `max_steps`.
      options: of the blocks; without adaLN and dropout.
      embed_dim: see Agent.
      num_layers: blocks.
      hidden_dim: see Agent.
      mixer: see `mixer_pattern`.

    Raises:
      UsageError: an option that an agent does not have, or a mixer that reads what is not there yet.
    """
    for name, left_out in (("adaln", "none"), ("dropout_rate", 0.0)):
        if getattr(options, name) != left_out:
            raise UsageError(
                f"config.model.{name}={getattr(options, name)!r} has no meaning for an agent; leave it out."
            )
    for name, value in (("embed_dim", embed_dim), ("hidden_dim", hidden_dim)):
        if value < 1:
            raise UsageError(f"config.model.{name}={value} must be at least 1.")
    stack = make_stack(mixer, embed_dim, num_layers, options, (environment.max_steps,))
    for made in (make() for make in stack.mixers):
        if not made.causal:  # type: ignore[attr-defined]
            raise UsageError(
                f"{type(made).__name__} reads later tokens, too, which an agent has not; use another mixer."
            )
        if getattr(made, "one_clock", False):
            raise UsageError(
                "config.model.mixer.one_clock lets time go on between episodes, but an agent's memory begins anew; leave it out."
            )
    return Agent(stack, embed_dim, len(environment.actions), hidden_dim)
