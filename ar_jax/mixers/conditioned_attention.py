"""A recurrent encoder with attention that external features condition (S044, arXiv:1906.03674), token by token."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.softmax_memory import NOTHING, Memory, empty_memory, softmax_memory
from ar_jax.mixers.common.conditioned_energy import CONDITIONINGS, ConditionedEnergy
from ar_jax.mixers.protocol import Tokens, in_time_order


@struct.dataclass
class EncoderState:
    """What is remembered.

    Attributes:
      carry: the LSTM's two vectors, [B, rnn_dim] float32 each.
      memory: the weighted mean of its outputs so far, and the log of the sum of their weights.
    """

    carry: tuple[Array, Array]
    memory: Memory


class ConditionedEncoder(nn.Module):
    """y_t = W_o [h_t, r_t],  r_t = sum_{j<=t} a_tj h_j,  a_t = softmax_{j<=t} e_j,  h = LSTM(x),  e_j of h_j and features c_j.

    The features are of the tokens fed, such as a lexicon's (`config.model.lexicon`), and do not enter the encoder. What a
    classifier reads behind the last token, r_T (see `ar_jax.models.conditioned_attention`), each token reads of those before
    it: e does not depend on who reads, so the state is one weighted mean. Queries leave no trace, and read no r of themselves.

    Attributes:
      rnn_dim: of the LSTM; None takes embed_dim.
      conditioning: one of CONDITIONINGS; see ConditionedEnergy, which `energy_layers` are for, too.
      energy_layers: of e.
    """

    embed_dim: int
    rnn_dim: int | None = None
    conditioning: str = "gate"
    energy_layers: int = 1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Of the LSTM."""
        return self.rnn_dim or self.embed_dim

    def setup(self) -> None:
        """The LSTM's gates, [D + rnn_dim, 4 rnn_dim] in two parts, the energy and the projection."""
        choose(dict.fromkeys(CONDITIONINGS), self.conditioning, "model.mixer.conditioning")
        if self.width < 1 or self.energy_layers < 1:
            raise UsageError("config.model.mixer: rnn_dim and energy_layers must be at least 1.")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.fed = Dense(4 * self.width, **types)
        self.kept = self.param("kept", nn.initializers.orthogonal(), (self.width, 4 * self.width), self.param_dtype)
        self.energy = ConditionedEnergy(self.conditioning, self.energy_layers, **types)
        self.out = Dense(self.embed_dim, **types)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> EncoderState:
        """See Mixer: a constant size, whatever the length."""
        carry = jnp.zeros((2, batch_size, self.width))
        return EncoderState((carry[0], carry[1]), empty_memory(batch_size, 1, 1, self.width))

    def __call__(
        self, x: Array, tokens: Tokens, state: EncoderState | None = None
    ) -> tuple[Array, EncoderState | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        features = tokens.features
        if features is None:
            features = jnp.zeros((*x.shape[:2], 0))
        features = jnp.broadcast_to(features, (len(x), *features.shape[1:]))
        out, after = in_time_order(self._mix, (self.fed(x), features), tokens, state)
        return self.out(out), None if state is None else after

    def _mix(
        self, given: tuple[Array, Array], writes: Array | None, starts: Array | None, state: EncoderState | None
    ) -> tuple[Array, EncoderState]:
        """See in_time_order; to [B, T, 2 rnn_dim]."""
        fed, features = given
        batch, length = fed.shape[:2]
        before = self.init_state(batch, length, 1) if state is None else state
        h, carry = self._encode(fed, writes, starts, before.carry)
        energy = self.energy(h, features if features.shape[-1] else None)
        if writes is not None:
            energy = jnp.where(writes, energy, NOTHING)
        ones = jnp.ones((batch, length, 1, 1))
        read, memory = softmax_memory(ones, energy[..., None, None], h[:, :, None], starts=starts, memory=before.memory)
        return jnp.concatenate([h, read[:, :, 0].astype(h.dtype)], axis=-1), EncoderState(carry, memory)

    def _encode(
        self, fed: Array, writes: Array | None, starts: Array | None, carry: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        """The LSTM's outputs [B, T, rnn_dim] of what is fed into its gates, and what it keeps."""
        shape = fed.shape[:2]
        there = jnp.ones(shape, bool) if writes is None else jnp.broadcast_to(writes, shape)
        anew = jnp.zeros(shape, bool) if starts is None else jnp.broadcast_to(starts, shape)
        kept = self.kept.astype(jnp.float32)

        def step(carry: tuple[Array, Array], token: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            fed_t, stays, fresh = token
            cell, hidden = (jnp.where(fresh[:, None], 0, a) for a in carry)
            into, forget, new, out = jnp.split(fed_t.astype(jnp.float32) + hidden @ kept, 4, axis=-1)
            next_cell = nn.sigmoid(forget) * cell + nn.sigmoid(into) * nn.tanh(new)
            read = nn.sigmoid(out) * nn.tanh(next_cell)
            after = tuple(jnp.where(stays[:, None], a, b) for a, b in ((next_cell, cell), (read, hidden)))
            return (after[0], after[1]), read

        carry, out = jax.lax.scan(step, carry, tuple(jnp.swapaxes(a, 0, 1) for a in (fed, there, anew)))
        return jnp.swapaxes(out, 0, 1).astype(self.dtype), carry
