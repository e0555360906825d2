"""Classifiers: what answers with a class. A new one is a file and a line in this table.

A classifier is a Linen module `(data, train, known) -> logits [B, classes]`, of images [B, H, W, C] or texts [B, length];
`known` is left out where the data has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, build, check_keys, choose, parameters
from ar_jax.data.protocol import Facts
from ar_jax.mixers.common.side_loss import with_side_loss
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.conditioned_attention import FeatureClassifier
from ar_jax.models.encoder import PADDING, encoder
from ar_jax.models.lexicons import LEXICONS
from ar_jax.models.vision import gated_cnn, large_kernel, nat
from ar_jax.models.vision.terminator import GROUPS, Terminator

SUPPLIED = ("facts", "num_classes", "options")


class _SlowFast(nn.Module):
    """Terminator, trained with its slow neural loss, too."""

    network: Terminator

    def __call__(self, data: Array, train: bool = False) -> Array:
        """Logits [B, classes]."""
        logits, slow = self.network(data, train)
        return with_side_loss(logits, slow)


def terminator(
    num_classes: int,
    factors: Sequence[int] = (4, 2, 2, 1, 1),
    kernel_sizes: Sequence[int] = (3, 5, 7, 9),
    groups: int = GROUPS,
    batch_kernels: bool = False,
    dropout_rate: float = 0.0,
    hidden_dim: int = 16,
) -> nn.Module:
    """See Terminator (S043); of fewer blocks, the first ones."""
    reads = Terminator.reads_before[: len(factors)]
    if len(factors) > len(reads):
        raise UsageError(f"config.model.factors={tuple(factors)} are more than {len(reads)} blocks; give fewer.")
    options: dict[str, Any] = dict(
        groups=groups, batch_kernels=batch_kernels, dropout_rate=dropout_rate, hidden_dim=hidden_dim
    )
    return _SlowFast(Terminator(num_classes, tuple(factors), reads, tuple(kernel_sizes), **options))


class _Conditioned(nn.Module):
    """A FeatureClassifier that is told a lexicon's entries of the characters."""

    network: FeatureClassifier
    lexicon: str

    def __call__(self, data: Array, train: bool = False) -> Array:
        """Logits [B, classes]; PADDING at the end is not read."""
        table = jnp.asarray(LEXICONS[self.lexicon](self.network.vocab_size))
        return self.network(data, table[data], (data != PADDING).sum(axis=1), train)[0]


def conditioned_attention(
    facts: Facts,
    lexicon: str = "byte_classes",
    embed_dim: int = 64,
    rnn_dim: int = 64,
    rnn_layers: int = 1,
    bidirectional: bool = False,
    conditioning: str = "gate",
    joined: Sequence[str] = (),
    embed_noise: float = 0.0,
    embed_dropout_rate: float = 0.0,
) -> nn.Module:
    """See FeatureClassifier (S044), for texts."""
    choose(LEXICONS, lexicon, "model.lexicon")
    if facts.modality != "text":
        raise UsageError(f"config.model.kind='conditioned_attention' reads texts, but the data is {facts.modality}.")
    network = FeatureClassifier(
        facts.levels,
        facts.num_classes,
        embed_dim,
        rnn_dim,
        rnn_layers,
        bidirectional,
        conditioning,
        joined=tuple(joined),
        embed_noise=embed_noise,
        embed_dropout_rate=embed_dropout_rate,
    )
    return _Conditioned(network, lexicon)


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "encoder": encoder,
    "nat": nat.nat,
    "van": large_kernel.van,
    "mamba_out": gated_cnn.mamba_out,
    "terminator": terminator,
    "conditioned_attention": conditioned_attention,
}


def build_classifier(config: Mapping[str, Any], facts: Facts) -> nn.Module:
    """The classifier that `config.model` describes: `kind`, that kind's options and, of blocks, fields of BlockOptions.

    Raises:
      UsageError: an unknown key or kind, or one that does not fit the data.
    """
    kind = config.get("kind")
    own = parameters(choose(CLASSIFIERS, kind, "model.kind"))
    of_blocks = parameters(BlockOptions) if "options" in own else {}
    check_keys(config, {"kind", *of_blocks, *own} - set(SUPPLIED), "model")
    if "facts" not in own and facts.modality != "image":
        raise UsageError(f"config.model.kind={kind!r} reads images, but the data is {facts.modality}; use 'encoder'.")
    given: dict[str, Any] = {"facts": facts, "num_classes": facts.num_classes}
    if of_blocks:
        block = {key: value for key, value in config.items() if key in of_blocks}
        given["options"] = build({"options": BlockOptions}, {"kind": "options"} | block, "model")
    return build(CLASSIFIERS, {k: v for k, v in config.items() if k not in of_blocks}, "model", **given)
