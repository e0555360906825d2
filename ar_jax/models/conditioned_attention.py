"""Attention that external features condition, over a recurrent encoder: a classifier of texts (S044, arXiv:1906.03674)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.mixers.common.conditioned_energy import ConditionedEnergy
from ar_jax.models.dropout import Dropout

PLACES = ("embedding", "encoder")


class ConditionedAttention(nn.Module):
    """r = sum_t a_t h_t,  a = softmax_t(e_t),  e_t of h_t and features c_t, which say where to look; what is read is h.

    Attributes:
      conditioning: see ConditionedEnergy, as the others.
    """

    conditioning: str = "gate"
    num_layers: int = 1
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, h: Array, features: Array | None = None, present: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        """What is read, [B, D], and where, [B, T].

        Args:
          h: [B, T, D].
          features: c, [B, T, F]; not read by "none".
          present: [B, T] bool, what is no padding, at least one of each example; None where nothing is.
          train: with dropout.
        """
        energy = ConditionedEnergy(self.conditioning, self.num_layers, self.dropout_rate, name="energy")
        energies = energy(h, features, train)
        if present is not None:
            energies = jnp.where(present, energies, -jnp.inf)
        weights = jax.nn.softmax(energies)
        return jnp.einsum("bt,btd->bd", weights.astype(h.dtype), h), weights


class FeatureClassifier(nn.Module):
    """Logits of classes from tokens and their features: embedding, LSTM layers, conditioned attention, a linear layer.

    Attributes:
      vocab_size: tokens are below it.
      num_classes: of the answers.
      embed_dim: of the tokens' embedding.
      rnn_dim: of each direction's LSTM.
      rnn_layers: 0 attends to the embedding.
      bidirectional: each layer reads both ways.
      conditioning: see ConditionedEnergy.
      attention_layers: see ConditionedEnergy.num_layers.
      joined: where features are also joined to: "embedding", "encoder", both or neither (the paper's baselines).
      embed_noise: deviation of the noise that training adds to the embedding.
      embed_dropout_rate: of the embedding.
      rnn_dropout_rate: between LSTM layers.
      attention_dropout_rate: see ConditionedEnergy.

    Raises:
      UsageError: an unknown place in `joined`.
    """

    vocab_size: int
    num_classes: int
    embed_dim: int = 300
    rnn_dim: int = 300
    rnn_layers: int = 1
    bidirectional: bool = False
    conditioning: str = "gate"
    attention_layers: int = 1
    joined: tuple[str, ...] = ()
    embed_noise: float = 0.0
    embed_dropout_rate: float = 0.0
    rnn_dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, tokens: Array, features: Array | None = None, lengths: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        """Logits [B, classes], and the attention [B, T].

        Args:
          tokens: [B, T] int32.
          features: [B, T, F], such as a lexicon's of each token.
          lengths: [B] int32, of at least 1; what is behind is padding.
          train: with noise (rng "noise") and dropout.
        """
        for place in self.joined:
            choose(dict.fromkeys(PLACES), place, "model.joined")
        if self.joined and features is None:
            raise UsageError(f"joined={self.joined} reads features; pass them, or set it to ().")
        x = nn.Embed(self.vocab_size, self.embed_dim, name="embed")(tokens)
        if train and self.embed_noise:
            x = x + self.embed_noise * jax.random.normal(self.make_rng("noise"), x.shape)
        x = Dropout(self.embed_dropout_rate)(x, deterministic=not train)
        x = self._joined(x, features, "embedding")
        for i in range(self.rnn_layers):
            x = self._encode(x, lengths, i)
            if i + 1 < self.rnn_layers:
                x = Dropout(self.rnn_dropout_rate)(x, deterministic=not train)
        x = self._joined(x, features, "encoder")
        present = None if lengths is None else jnp.less(jnp.arange(x.shape[1])[None], lengths[:, None])
        attention = ConditionedAttention(
            self.conditioning, self.attention_layers, self.attention_dropout_rate, name="attention"
        )
        read, weights = attention(x, features, present, train)
        return nn.Dense(self.num_classes, name="head")(read), weights

    def _joined(self, x: Array, features: Array | None, place: str) -> Array:
        if features is None or place not in self.joined:
            return x
        return jnp.concatenate([x, features.astype(x.dtype)], axis=-1)

    def _encode(self, x: Array, lengths: Array | None, layer: int) -> Array:
        """One LSTM layer, [B, T, D] to [B, T, rnn_dim], or twice that."""

        def one(name: str, backward: bool) -> Any:
            return nn.RNN(nn.OptimizedLSTMCell(self.rnn_dim), reverse=backward, keep_order=True, name=f"{name}_{layer}")

        read = one("forward", False)(x, seq_lengths=lengths)
        if not self.bidirectional:
            return read
        return jnp.concatenate([read, one("backward", True)(x, seq_lengths=lengths)], axis=-1)
