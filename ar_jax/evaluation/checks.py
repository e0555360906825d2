"""What the data themselves tell of a model: whether its answers are right, whether its samples are possible."""

from __future__ import annotations

import numpy as np

from ar_jax.data.protocol import Dataset
from ar_jax.evaluation.batches import held_out_batches
from ar_jax.generator_run import Run


def checks(run: Run, data: Dataset, batch_size: int) -> dict[str, float]:
    """Metrics that a data set has a measure for; nothing where it has none.

    Args:
      run: what answers, and is sampled from.
      data: its data set, or another of the same kind.
      batch_size: examples or samples that are drawn at once.

    Returns:
      `exact_fraction` of data with a part that is told (see `answered`), and what the data's own `judge` says of so many
      unconditional samples as fill a batch.
    """
    metrics = {}
    if data.told is not None:
        metrics["exact_fraction"] = answered(run, data, batch_size)
    if data.judge is not None:
        metrics |= data.judge(run.sample(num_samples=batch_size, seed=run.config["seed"]))
    return metrics


def answered(run: Run, data: Dataset, batch_size: int) -> float:
    """The fraction of held-out examples of which the part that is not told is drawn, at temperature 0, just as it is."""
    assert data.told is not None
    given_mask = run.slots_within(np.logical_and.reduce(data.told, axis=-1))
    right, count = 0.0, 0.0
    for batch in held_out_batches(data, batch_size, run.params):
        tokens = run.encode(batch["image"])
        drawn = run.sample_tokens(num_samples=len(tokens), given=tokens, given_mask=given_mask, temperature=0.0)
        right += float(((drawn == tokens).all(axis=1) * batch["weight"]).sum())
        count += float(np.sum(batch["weight"]))
    return right / count
