"""Writes a data set's tokens: python -m ar_jax.tokenize --workdir=DIR --out=SHARDS [--dtype=float16] [--config.data.key=value ...].

DIR is the run of a tokenizer. Its own data is read, or another data set of images of the same shape that --config.data names.
Train on the result with config.data = dict(kind="token_shards", path="SHARDS").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from ar_jax import command
from ar_jax.config import UsageError, choose
from ar_jax.data.protocol import Dataset, Facts, Source
from ar_jax.data.token_shards import SPLITS, Meta, new_folder, write_meta, write_split
from ar_jax.tokenizer_system import TokenizerRun
from ar_jax.training.checkpoints import tree_digest
from ar_jax.training.workdir import plain_values, read_config

BATCH_SIZE = 256
DTYPES = {"float32": np.float32, "float16": np.float16}


def tokenize(run: TokenizerRun, data: Dataset, out: str | Path, dtype: str = "float32") -> Meta:
    """Writes the tokens of all images of a data set, as they are: none is mirrored or cropped.

    Args:
      run: the tokenizer.
      data: images of its shape.
      out: the folder to make; see `ar_jax.data.token_shards`.
      dtype: of continuous tokens, "float32" or "float16". Codes are uint16 where those suffice, else int32.

    Raises:
      UsageError: images of another shape, an unknown dtype, or `out` exists or cannot be written.
    """
    tokenizer = run.system.tokenizer
    choose(DTYPES, dtype, "dtype")
    if tuple(data.shape) != tuple(run.system.facts.shape) or data.modality != "image":
        raise UsageError(f"The data has shape {data.shape}, but the tokenizer takes {run.system.facts.shape}.")
    length = sum(int(np.prod(grid)) for grid in tokenizer.layout)
    meta = Meta(
        facts=Facts(data.modality, data.shape, data.levels, data.label_names),
        shape=(length,) if tokenizer.vocab_size else (length, tokenizer.channels),
        dtype=("uint16" if tokenizer.vocab_size <= 2**16 else "int32") if tokenizer.vocab_size else dtype,
        layout=tokenizer.layout,
        vocab_size=tokenizer.vocab_size,
        counts={split: len(getattr(data, split)) for split in SPLITS},
        tokenizer=_origin(run),
    )
    with new_folder(out) as folder:
        for split in SPLITS:
            write_split(folder, split, _encoded(run, getattr(data, split)), meta)
        write_meta(folder, meta)
    return meta


def digest(run: TokenizerRun) -> str:
    """Eight hexadecimal digits for each leaf of the tokenizer's parameters, folded to one number of 64 bits."""
    folded = 0
    for leaf in jax.device_get(tree_digest(run.params["tokenizer"])):
        folded = (folded * 0x100000001B3 + int(leaf)) % 2**64
    return f"{folded:016x}"


def _origin(run: TokenizerRun) -> dict[str, Any]:
    return {"digest": digest(run), "step": run.step, "config": plain_values(run.config)["tokenizer"]}


def _encoded(run: TokenizerRun, source: Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of a source in its order. All batches have one shape, so one program serves them."""
    for start in range(0, len(source), BATCH_SIZE):
        indices = np.arange(start, min(start + BATCH_SIZE, len(source)))
        batch = source.take(np.resize(indices, BATCH_SIZE))
        yield run.encode(batch["image"])[: len(indices)], batch["label"][: len(indices)]


def main(arguments: Sequence[str]) -> None:
    """The command."""
    from ar_jax.run import load, load_data

    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the folder to make", flag_values=values, required=True)
    flags.DEFINE_string("dtype", "float32", "of continuous tokens: float32 or float16", flag_values=values)
    config, workdir = command.parse(values(arguments, known_only=True), read_config)
    run = load(workdir, config)
    if not isinstance(run, TokenizerRun):
        raise UsageError(f"{workdir} holds no tokenizer; train one, such as configs/tokenizers/vqgan.py.")
    meta = tokenize(run, load_data(config), values.out, values.dtype)
    print(f"tokenize: {values.out} holds {meta.counts} examples of {list(meta.shape)} {meta.dtype}")
    print(json.dumps({"digest": meta.tokenizer["digest"], **meta.counts}))


if __name__ == "__main__":
    command.call(main)
