"""What a tokenizer promises: data to tokens on grids, and back."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax import Array

from ar_jax.orders.protocol import Layout

Params = Any


class Tokenizer(Protocol):
    """Tokens are int32 [B, L] below vocab_size, or float32 [B, L, channels] where vocab_size is 0.

    The methods are pure and traceable. A learned tokenizer keeps what it learned in `params`; others have none, {}. What
    its training needs besides is told by `ar_jax.tokenizers.learned.LearnedTokenizer`.

    A tokenizer whose scales add up to one another has `resample_channels` > 0 and `resample(params, values, slots)`:
    tokens [B, L] and slots [n], a numpy array, to [B, n, resample_channels], what the scales coarser than each slot's tell
    of its place; zeros for the first scale.

    A tokenizer whose layout's last axis counts codes of one place may have `vocab_sizes`, of each such code; else they are
    all below vocab_size.

    A tokenizer whose tokens have a vector each has `vector_channels` > 0 and `vectors(params, tokens)`: tokens [B, n] to
    [B, n, vector_channels].
    """

    vocab_size: int  # 0 for continuous tokens
    channels: int  # 0 for discrete tokens
    layout: Layout  # the grids that the tokens fill, in this order: one, or one per scale from coarse to fine
    num_dims: int  # numbers in one example of the data, for bits per dimension
    data_key: str  # the name of the data in a batch: "image", "video" or "text"

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""

    def encode(self, params: Params, data: Array, key: jax.Array | None = None) -> Array:
        """Data [B, ...] to tokens [B, L] or [B, L, channels].

        A tokenizer whose tokens have a distribution draws them with the key, and gives their mean without one.
        """

    def decode(self, params: Params, tokens: Array) -> Array:
        """Tokens to data [B, ...]."""

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """Data [B, ...] of which only the tokens where known [B, L] is true have been generated; the rest is blank."""
