"""Held-out examples on the devices that a run's parameters lie on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ar_jax.data import pipeline
from ar_jax.data.protocol import Dataset
from ar_jax.system import compiled, mesh_of
from ar_jax.training.sharding import batch_sharding, num_batch_shards, own_rows, put_batch


def held_out_batches(data: Dataset, batch_size: int, params: Any) -> Iterator[dict[str, Any]]:
    """One pass over the held-out examples, in order, each process reading what its devices need.

    Args:
      data: its `test`.
      batch_size: examples of a batch; at most as many as there are, and rounded up to a multiple of the devices that
        batches are cut over.
      params: of a run.

    Returns:
      Batches as the data gives them, arrays [B, ...] cut over the mesh of the parameters, where they have one; and `weight`,
      float32 numpy [B]: 0 for examples that only fill the last batch. What `compiled` functions make of them is whole in every
      process.
    """
    mesh, size = mesh_of(params), min(batch_size, len(data.test))
    if mesh is None:
        yield from pipeline.test_batches(data, size)
        return
    size += -size % num_batch_shards(mesh)
    sharding = batch_sharding(mesh)
    for batch in pipeline.test_batches(data, size, own_rows(sharding, size)):
        weight = batch.pop("weight")
        yield put_batch(batch, sharding, size) | {"weight": weight}


def whole(array: Any) -> np.ndarray:
    """All rows of an array of such a batch, in every process."""
    return np.asarray(compiled(_itself)(array))


def _itself(array: Any) -> Any:
    return array
