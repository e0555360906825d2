"""Held-out likelihood with its units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ar_jax.system import System


def likelihood(
    system: System,
    log_prob: Callable[..., jax.Array],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    seed: int = 0,
) -> dict[str, float]:
    """The mean negative log-likelihood of held-out examples.

    Args:
      system: the parts.
      log_prob: `system.log_prob`, compiled.
      params: the network's parameters.
      batches: of one shape; `weight` [B] is 0 for examples that only fill the last batch.
      seed: draws the orders of a shuffled order, one per example: then the result estimates the mean over orders.

    Returns:
      `nll_nats_per_example`, and for discrete tokens `bits_per_dim` (of the data's numbers; with several scales an upper
      bound) and, for text, `perplexity_per_token`. Continuous tokens have a density, so the first may be negative.
    """
    total, count = 0.0, 0.0
    for index, batch in enumerate(batches):
        arrays = {k: v for k, v in batch.items() if k != "weight"}
        nats = np.asarray(log_prob(params, arrays, jax.random.fold_in(jax.random.key(seed), index)), np.float64)
        weight = np.asarray(batch.get("weight", np.ones(len(nats))), np.float64)
        total, count = total - (nats * weight).sum(), count + weight.sum()
    metrics = {"nll_nats_per_example": total / count}
    if system.tokenizer.vocab_size:
        metrics["bits_per_dim"] = total / count / system.tokenizer.num_dims / math.log(2)
        if system.facts.modality == "text":
            metrics["perplexity_per_token"] = math.exp(total / count / system.model.order.length)
    return metrics
