"""Writes a data set's tokens in a model's own orders: python -m ar_jax.distill_orders --workdir=DIR --out=SHARDS.

DIR is the run of a generator that was trained in any order and samples in an adaptive one, such as configs/oar.py. Each example
gets the order in which that network is surest of its tokens (S175, arXiv:2504.17069). Train on in these orders with
config.data = dict(kind="token_shards", path="SHARDS") and config.train.init_from = "DIR".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax import Array

from ar_jax import command
from ar_jax.config import UsageError
from ar_jax.data.protocol import Dataset, Facts, Source
from ar_jax.data.token_shards import SPLITS, Meta, new_folder, write_meta, write_split
from ar_jax.evaluation.report import check_eval
from ar_jax.run import Run, load, load_data
from ar_jax.sampling.own_order import own_order
from ar_jax.system import compiled
from ar_jax.training.workdir import plain_values, read_config


def distill_orders(run: Run, data: Dataset, out: str | Path) -> Meta:
    """Writes the tokens of all examples of a data set, and for each the order in which the model would generate it.

    Args:
      run: the model; see `own_order`.
      data: what it was trained on, or its like. So many examples at a time as `config.eval.batch_size` says.
      out: the folder to make; see `ar_jax.data.token_shards`.

    Raises:
      UsageError: a model whose order is not its own, tokens that are vectors, or `out` exists or cannot be written.
    """
    tokenizer = run.system.tokenizer
    if not tokenizer.vocab_size:
        raise UsageError("Orders are distilled of tokens that are numbers; choose a tokenizer with a vocabulary.")
    meta = Meta(
        facts=Facts(data.modality, data.shape, data.levels, data.label_names),
        shape=(run.system.sampler.order.length,),
        dtype="uint16" if tokenizer.vocab_size <= 2**16 else "int32",
        layout=tokenizer.layout,
        vocab_size=tokenizer.vocab_size,
        counts={split: len(getattr(data, split)) for split in SPLITS},
        tokenizer={"config": plain_values(run.config)["tokenizer"], "step": run.step},
        ordered=True,
    )
    with new_folder(out) as folder:
        for split in SPLITS:
            write_split(folder, split, ordered(run, getattr(data, split)), meta)
        write_meta(folder, meta)
    return meta


def ordered(run: Run, source: Source) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens [B, L], labels [B] and slots [B, L] of a source in its order. All batches have one shape."""
    system = run.system

    def tokens_and_slots(params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, Array]:
        values = system.tokens_of(params, batch)
        context = system.sampler.context(key, len(values), system.condition_of(params, batch))
        return values, own_order(system.sampler, params, values, context)

    find, size = compiled(tokens_and_slots), min(check_eval(run.config), len(source))
    for start in range(0, len(source), size):
        indices = np.arange(start, min(start + size, len(source)))
        batch = source.take(np.resize(indices, size))
        values, slots = find(run.params, dict(batch), jax.random.key(run.config["seed"]))
        yield tuple(np.asarray(a)[: len(indices)] for a in (values, batch["label"], slots))  # type: ignore[misc]


def main(arguments: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the folder to make", flag_values=values, required=True)
    config, workdir = command.parse(values(arguments, known_only=True), read_config)
    run = load(workdir, config)
    if not isinstance(run, Run):
        raise UsageError(f"{workdir} holds a tokenizer, which has no order; give the run of a generator.")
    meta = distill_orders(run, load_data(config), values.out)
    print(
        f"distill_orders: {values.out} holds {meta.counts} examples of {list(meta.shape)} {meta.dtype} and their orders"
    )
    print(json.dumps(meta.counts))


if __name__ == "__main__":
    command.call(main)
