"""Loki from a trained model: python -m ar_jax.calibrate --workdir=DIR --out=NEW [--num_keys=64] [--rank=8] [--batches=8].

DIR is the run of a model of softmax attention. The principal components of its keys are measured on its training data; NEW is
a run of the same model that reads the num_keys keys with the largest scores in `rank` components. eval.py and `ar_jax.load`
take it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from ar_jax import command
from ar_jax.analysis.key_components import calibrated
from ar_jax.config import UsageError
from ar_jax.models.from_softmax import from_softmax
from ar_jax.run import Run, build_run, load, load_data
from ar_jax.training.workdir import plain_values, read_config

BATCH_SIZE = 32


def calibrate(run: Run, data: Any, num_keys: int, rank: int | None, batches: int = 8) -> tuple[Run, dict[str, Any]]:
    """A run of the same model with mixers of kind "loki", and the shares of the keys' variance by leaf.

    Args:
      run: of mixers of kind "softmax".
      data: what the components are measured on.
      num_keys: see Loki.
      rank: see Loki.
      batches: of 32 examples of the training data.

    Raises:
      UsageError: the run has other mixers, or a number is out of its range.
    """
    config = ConfigDict(plain_values(run.config))
    mixer = dict(config.model.mixer)
    if mixer.get("kind") != "softmax" or batches < 1:
        raise UsageError(
            f"calibrate needs mixers of kind 'softmax', not {mixer.get('kind')!r}, and at least one batch."
        )
    config.model.mixer = mixer | {"kind": "loki", "num_keys": num_keys, "rank": rank}
    fresh = build_run(config, data)
    assert isinstance(fresh, Run)
    params = from_softmax(run.params, fresh.params)
    params, shares = calibrated(fresh.system.model, params, _batches(fresh, params, data, batches))
    return Run(fresh.system, params, config, run.step), shares


def _batches(run: Run, params: Any, data: Any, count: int) -> Iterator[tuple[Any, Any]]:
    """Tokens and contexts of random training examples."""
    system, chosen = run.system, np.random.default_rng(0).permutation(len(data.train))
    for i in range(count):
        indices = (
            np.resize(chosen[i * BATCH_SIZE : (i + 1) * BATCH_SIZE], BATCH_SIZE)
            if i * BATCH_SIZE < len(chosen)
            else None
        )
        if indices is None:
            return
        batch = {name: jnp.asarray(a) for name, a in data.train.take(indices).items()}
        yield (
            system.tokens_of(params, batch),
            system.model.context(jax.random.key(i), BATCH_SIZE, system.condition_of(params, batch)),
        )


def main(arguments: Sequence[str]) -> None:
    """The command."""
    from ar_jax.interop.workdirs import write_run

    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the directory to make", flag_values=values, required=True)
    flags.DEFINE_integer("num_keys", 64, "keys that each query head reads", flag_values=values)
    flags.DEFINE_integer("rank", None, "components that scores are made of", flag_values=values)
    flags.DEFINE_integer("batches", 8, "batches of 32 examples", flag_values=values)
    config, workdir = command.parse(values(arguments, known_only=True), read_config)
    out = Path(values.out)
    if out.exists():
        raise UsageError(f"{out} exists; name a new directory.")
    run, data = load(workdir, config), load_data(config)
    if not isinstance(run, Run):
        raise UsageError(f"{workdir} holds a tokenizer; give the run of a model.")
    found, shares = calibrate(run, data, values.num_keys, values.rank, values.batches)
    out.mkdir(parents=True)
    write_run(out, found.config, found.system, data, jax.device_get(found.params))
    rank = values.rank or max(next(iter(shares.values())).shape[-1] // 4, 1)
    kept = np.mean([share[..., :rank].sum(axis=-1) for share in shares.values()])
    print(f"calibrate: {out} reads {values.num_keys} keys by {rank} components, {kept:.1%} of the keys' variance")


if __name__ == "__main__":
    command.call(main)
