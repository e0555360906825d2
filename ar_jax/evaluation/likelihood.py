"""Held-out likelihood with its units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.heads.noise import Drawn
from ar_jax.heads.protocol import Sampling
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.system import System, compiled
from ar_jax.tokenizers.learned import LearnedTokenizer


def mean_loss(
    system: System, params: Any, batches: Iterable[Mapping[str, np.ndarray]], seed: int = 0
) -> dict[str, float]:
    """The objective's loss of held-out examples, at the end of the training's schedules: for heads without a likelihood.

    Args:
      system: the parts.
      params: see System.
      batches: of one shape. Examples that only fill the last batch count like the others.
      seed: draws orders, masks and noise.

    Returns:
      `loss`.
    """
    loss = compiled(lambda params, batch, key: system.loss(params, batch, key, jnp.float32(1))[0])
    keys = (jax.random.fold_in(jax.random.key(seed), index) for index in range(2**31))
    losses = [
        float(loss(params, {k: v for k, v in batch.items() if k != "weight"}, key))
        for batch, key in zip(batches, keys, strict=False)
    ]
    return {"loss": float(np.mean(losses))}


def token_errors(
    system: System, params: Any, batches: Iterable[Mapping[str, np.ndarray]], seed: int = 0
) -> dict[str, float]:
    """How often the most probable value of a token, given the data before it, is not its own (VAR, arXiv:2404.02905, sec. 5.2).

    Args:
      system: of discrete tokens.
      params: see System.
      batches: as in `likelihood`.
      seed: of shuffled orders.

    Returns:
      `token_error_rate`, a fraction; nothing for feeds without a parallel form, which need an evaluation for each step, and
      for heads that draw tokens together, which know of no token before.
    """
    model = system.model
    together = getattr(model.generator.head, "draws_jointly", False)
    if together or not (model.feed.has_parallel and system.tokenizer.vocab_size):
        return {}

    def wrong(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        values, condition = system.tokens_of(params, batch), system.condition_of(params, batch)
        context = model.context(key, len(values), condition)
        hidden, target = teacher_forced(model, model.feed.parallel(), params, values, context)
        surest = model.ask(params, "sample", hidden, Drawn(key), Sampling(temperature=jnp.float32(0)))
        return (surest != target).mean(axis=1)

    count, total, found = 0.0, 0.0, compiled(wrong)
    for index, batch in enumerate(batches):
        arrays = {k: v for k, v in batch.items() if k != "weight"}
        share = np.asarray(found(params, arrays, jax.random.fold_in(jax.random.key(seed), index)), np.float64)
        weight = np.asarray(batch.get("weight", np.ones(len(share))), np.float64)
        total, count = total + (share * weight).sum(), count + weight.sum()
    return {"token_error_rate": total / count}


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
      `nll_nats_per_example`; with a learned tokenizer `bits_per_token`, with other discrete tokens `bits_per_dim` (of the
      data's numbers; with several scales an upper bound), and for text `perplexity_per_token`. Continuous tokens have a
      density, so the first may be negative.
    """
    total, count = 0.0, 0.0
    for index, batch in enumerate(batches):
        arrays = {k: v for k, v in batch.items() if k != "weight"}
        nats = np.asarray(log_prob(params, arrays, jax.random.fold_in(jax.random.key(seed), index)), np.float64)
        weight = np.asarray(batch.get("weight", np.ones(len(nats))), np.float64)
        total, count = total - (nats * weight).sum(), count + weight.sum()
    metrics = {"nll_nats_per_example": total / count}
    if isinstance(
        system.tokenizer, LearnedTokenizer
    ):  # its tokens do not tell the data, so the data have no likelihood
        metrics["bits_per_token"] = total / count / system.model.order.length / math.log(2)
    elif system.tokenizer.vocab_size:
        metrics["bits_per_dim"] = total / count / system.tokenizer.num_dims / math.log(2)
        if system.facts.modality == "text":
            metrics["perplexity_per_token"] = math.exp(total / count / system.model.order.length)
    return metrics
