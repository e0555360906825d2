"""Rotary embeddings that turn halves of a head against each other, as weights of ones that turn neighbouring channels."""

from __future__ import annotations

import numpy as np


def pairs_of_halves(rows: np.ndarray, num_heads: int, channels: int) -> np.ndarray:
    """Rows of queries or keys, sorted so that channels i and i + channels / 2 of each head become 2 i and 2 i + 1.

    Args:
      rows: [heads H, ...], a weight or a bias whose first axis is the output.
      num_heads: heads.
      channels: the first so many channels of a head turn; the others stay where they are.
    """
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])
    first = np.arange(channels).reshape(2, -1).T.reshape(-1)
    order = np.concatenate([first, np.arange(channels, heads.shape[1])]).astype(int)
    return heads[:, order].reshape(rows.shape)
