"""Data that a tokenizer has already seen: tokens in array_record files, with the facts of the images they were.

A folder holds `tokens.json` (what the tokens are, and of what) and `{train,test}-*.array_record`. A record is a label, int32,
followed by the tokens [L] or [L, C], and by an order of them, int32 [L], where they have one, all little-endian.
`python -m ar_jax.tokenize` writes such a folder, and `python -m ar_jax.distill_orders` one with orders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module  # type: ignore[import-untyped]

from ar_jax.config import UsageError
from ar_jax.data.files import find
from ar_jax.data.protocol import Dataset, Example, Facts

META = "tokens.json"
SPLITS = ("train", "test")
RECORDS_PER_SHARD = 65536
# Groups of 1 are what random access wants. Nothing is compressed: codes are close to noise.
_WRITER_OPTIONS = "group_size:1,uncompressed"
REMEDY = "write it with: python -m ar_jax.tokenize --workdir=DIR --out=SHARDS"


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a folder of tokens says of itself.

    Attributes:
      facts: of the images.
      shape: [L] of an image's codes, or [L, C] of its continuous tokens.
      dtype: of the stored numbers: "uint16" or "int32" for codes, "float32" or "float16".
      layout: the grids that the tokens fill.
      vocab_size: 0 for continuous tokens.
      counts: examples of each split.
      tokenizer: where they come from: the configuration of the tokenizer, its steps, and a digest of its parameters.
      ordered: each example brings the order in which its tokens are to be generated.
    """

    facts: Facts
    shape: tuple[int, ...]
    dtype: str
    layout: tuple[tuple[int, ...], ...]
    vocab_size: int
    counts: dict[str, int]
    tokenizer: dict[str, Any]
    ordered: bool = False

    @property
    def record_size(self) -> int:
        """Bytes of a record."""
        return self.order_offset + self.ordered * 4 * self.shape[0]

    @property
    def order_offset(self) -> int:
        """Bytes of a record before its order."""
        return 4 + int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class TokenRecords:
    """A source of tokens: `records` gives bytes for an index, and is read when asked."""

    records: Any
    meta: Meta

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        """`tokens` int32 [L] or float32 [L, C], `label` int32 [], and `slots` int32 [L] where there are orders."""
        return {key: value[0] for key, value in self.take(np.asarray([index])).items()}

    def take(self, indices: np.ndarray) -> Example:
        """`tokens` int32 [B, L] or float32 [B, L, C], `label` int32 [B], and `slots` int32 [B, L] where there are orders."""
        raw = self.records.__getitems__(np.asarray(indices).tolist())  # one call for all, in parallel
        dtype, count = np.dtype(self.meta.dtype).newbyteorder("<"), int(np.prod(self.meta.shape))
        stored = [np.frombuffer(record, dtype, count=count, offset=4) for record in raw]
        kind = np.int32 if self.meta.vocab_size else np.float32
        orders = [np.frombuffer(record, "<i4", offset=self.meta.order_offset) for record in raw]
        return ({"slots": np.stack(orders).astype(np.int32)} if self.meta.ordered else {}) | {
            "tokens": np.stack(stored).astype(kind).reshape(-1, *self.meta.shape),
            "label": np.asarray([np.frombuffer(record, "<i4", count=1)[0] for record in raw], np.int32),
        }


def load_token_shards(path: str) -> Dataset:
    """Tokens of images, for a model that is trained on them; batches hold `tokens` in place of `image`.

    Args:
      path: the folder.

    Raises:
      UsageError: it is missing, incomplete or damaged.
    """
    folder = find(path, REMEDY)
    meta = read_meta(folder)
    train, test = (TokenRecords(_open(folder, split, meta), meta) for split in SPLITS)
    facts = meta.facts
    return Dataset(facts.modality, facts.shape, facts.levels, facts.label_names, train=train, test=test)


def read_meta(folder: Path) -> Meta:
    """What a folder of tokens says of itself.

    Raises:
      UsageError: it says nothing, or not what it should.
    """
    try:
        stored = json.loads((folder / META).read_text())
        facts = stored.pop("facts")
        facts = Facts(facts["modality"], tuple(facts["shape"]), facts["levels"], tuple(facts["label_names"]))
        shape, layout = tuple(stored.pop("shape")), tuple(tuple(grid) for grid in stored.pop("layout"))
        meta = Meta(facts=facts, shape=shape, layout=layout, **stored)
        np.dtype(meta.dtype), [meta.counts[split] for split in SPLITS]  # raise if they are not what they should be
        return meta
    except FileNotFoundError as error:
        raise UsageError(f"{folder} has no {META}, so it is no folder of tokens; {REMEDY}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / META} cannot be read ({error}); {REMEDY}.") from error


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write in, which takes its name once the context ends well: it is there whole or not at all.

    Raises:
      UsageError: there is something by that name, or it cannot be written.
    """
    target = Path(path).absolute()
    part = target.with_name(f".{target.name}.part")
    if target.exists():
        raise UsageError(f"{target} exists; remove it, or choose another --out.")
    try:
        if part.exists():  # of a process that was stopped
            shutil.rmtree(part)
        part.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"Cannot write to {part} ({error.strerror or error}); choose another --out.") from error
    yield part
    os.replace(part, target)


def write_split(folder: Path, split: str, batches: Iterable[tuple[np.ndarray, ...]], meta: Meta) -> None:
    """Writes tokens [B, L(, C)], labels [B] and, of ordered ones, slots [B, L] as the examples of a split.

    They are cut into shards of RECORDS_PER_SHARD.
    """
    count = max(1, -(-meta.counts[split] // RECORDS_PER_SHARD))
    rows = (row for batch in batches for row in zip(*batch, strict=True))
    for shard in range(count):
        file = folder / f"{split}-{shard:05}-of-{count:05}.array_record"
        writer = array_record_module.ArrayRecordWriter(str(file), _WRITER_OPTIONS)
        for _ in range(min(RECORDS_PER_SHARD, meta.counts[split] - shard * RECORDS_PER_SHARD)):
            tokens, label, *slots = next(rows)
            stored = np.asarray(tokens).astype(np.dtype(meta.dtype).newbyteorder("<"))
            order = np.asarray(slots, "<i4").tobytes() if meta.ordered else b""
            writer.write(np.asarray(label, "<i4").tobytes() + stored.tobytes() + order)
        writer.close()


def write_meta(folder: Path, meta: Meta) -> None:
    """Writes what a folder of tokens says of itself."""
    (folder / META).write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n")


def _open(folder: Path, split: str, meta: Meta) -> Any:
    """Random access to the records of a split; the first and the last are read at once, to tell broken files."""
    files = sorted(str(file) for file in folder.glob(f"{split}-*-of-*.array_record"))
    try:
        records = grain.sources.ArrayRecordDataSource(files)
        ends = len(records[0]), len(records[len(records) - 1])
    except Exception as error:  # whatever the reader raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(f"{folder} has no readable {split}-*.array_record ({reason}); {REMEDY}.") from error
    if len(records) != meta.counts[split] or set(ends) != {meta.record_size}:
        raise UsageError(
            f"{folder} has {len(records)} {split} records of {ends[0]} bytes, but {META} says {meta.counts[split]} of "
            f"{meta.record_size}; {REMEDY}."
        )
    return records
