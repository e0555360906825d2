"""Files of official weights, as one flat table of arrays: .safetensors, and what torch.save writes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from ar_jax.config import UsageError
from ar_jax.interop.torch_file import LEGACY_MAGIC, ZIP_MAGIC, read_torch

# Where training checkpoints keep the weights, in the order of preference: averaged weights first, as samplers do.
CONTAINERS = (
    "model_ema", "model", "state_dict", "module", "ema", "trainer/vae_local", "trainer/var_wo_ddp",
)  # fmt: skip
WRAPPERS = ("module.", "_orig_mod.")  # what parallel and compiled modules put in front of every name
DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


def read_weights(files: str, key: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of one or several files by name, as views of memory maps.

    Args:
      files: FILE, or FILE,FILE where a checkpoint has several parts: shards, or a tokenizer beside its generator.
      key: where in the file the weights are, such as `model_ema` or `trainer/vae_local`; one for each file where there
        are commas; None takes the first of CONTAINERS that there is, or the file's outermost dict.

    Raises:
      UsageError: a file that is missing or damaged or has no weights there, or two that have the same name.
    """
    paths = [Path(name.strip()) for name in files.split(",") if name.strip()]
    keys: list[str | None] = [None] if key is None else [part.strip() for part in key.split(",")]
    keys = keys * len(paths) if len(keys) == 1 else keys
    if not paths:
        raise UsageError("--weights names no file; give --weights=FILE or --weights=FILE,FILE.")
    if len(keys) != len(paths):
        raise UsageError(
            f"--weights names {len(paths)} files, but --key {len(keys)} places; give one, or one for each."
        )
    weights: dict[str, np.ndarray] = {}
    for path, place in zip(paths, keys, strict=True):
        found = read_file(path, place)
        for name in found:
            if name in weights:
                raise UsageError(
                    f"{path} has {name!r}, which another file has, too; give each part of the weights once."
                )
        weights.update(found)
    return weights


def read_file(path: Path, key: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of one file by name; arguments and errors as `read_weights`."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); give the path of a file.") from error
    if start.startswith(ZIP_MAGIC) or LEGACY_MAGIC in start:
        return state_dict(read_torch(path), key, path)
    if key is not None:
        raise UsageError(f"{path} has no places such as {key!r}; leave --key out, it is for files of torch.save.")
    return _unwrapped(read_safetensors(path), path)


def read_safetensors(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file whose names begin with a prefix, by name, as views of a memory map.

    Raises:
      UsageError: the file is missing, damaged or of another format, or an array has an exotic dtype.
    """
    try:
        with safetensors.safe_open(path, "numpy"):  # checks the header and the length of the file
            pass
        mapped = np.memmap(path, np.uint8, "r")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"{path} is neither a whole .safetensors file nor one of torch.save ({error}); download it again."
        ) from error
    (length,) = struct.unpack("<Q", mapped[:8].tobytes())
    header = json.loads(mapped[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if not name.startswith(prefix):
            continue
        if entry["dtype"] not in DTYPES:
            raise UsageError(f"{name!r} in {path} has dtype {entry['dtype']}; save it as float32.")
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = mapped[first:last].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name; on an error the path is as it was."""
    part = path.with_name(f".{path.name}.part")
    try:
        safetensors.numpy.save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, part)
        part.replace(path)
    except OSError as error:
        raise UsageError(f"Cannot write {path} ({error.strerror or error}); choose another place.") from error
    finally:
        part.unlink(missing_ok=True)


def state_dict(tree: Any, key: str | None, path: Path) -> dict[str, np.ndarray]:
    """The arrays by name that are somewhere in what a file holds; arguments and errors as `read_weights`."""
    found = _at(tree, key)
    if key is None:
        found = next((place for place in (_at(tree, name) for name in CONTAINERS) if isinstance(place, Mapping)), tree)
    weights = dict(_arrays(found, ())) if isinstance(found, Mapping) else {}
    if not weights:
        keys = [str(name) for name in tree] if isinstance(tree, Mapping) else []
        raise UsageError(
            f"{path} has no weights at {key or 'its top'!r}; set --key to where they are"
            f"{f', such as one of {keys[:8]}' if keys else ''}."
        )
    return _unwrapped(weights, path)


def _at(tree: Any, key: str | None) -> Any:
    """What is at a/b of nested dicts, or None."""
    for name in key.split("/") if key else ():
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _arrays(tree: Any, path: tuple[str, ...]) -> Sequence[tuple[str, np.ndarray]]:
    """All arrays of a tree with their names; counters, options and the like are left out."""
    if isinstance(tree, np.ndarray):
        return [(".".join(path), tree)]
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for name, value in items for found in _arrays(value, (*path, str(name)))]


def _unwrapped(weights: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The weights without WRAPPERS in front of their names."""
    plain: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        if name in plain:
            raise UsageError(f"{path} has {name!r} twice, with {WRAPPERS[0]!r} and without; set --key to one of them.")
        plain[name] = array
    return plain
