"""Files of torch.save, read without torch and without running what is in them.

The pickle inside such a file may name any function of any module to be called. Here only tensors and plain containers
are made; every other name becomes an inert object, never imported and never called. Values stay in the file until they
are used: arrays are views of a memory map. (Those of files before torch 1.6 are read at once.)
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ar_jax.config import UsageError

STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = (
    b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the end of the pickled number that files before torch 1.6 begin with
)
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip: the lengths of its name and of its extra field


class Inert:
    """What a name that is no tensor becomes: takes every argument, does nothing, holds nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """An instance, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Itself."""
        return self

    def __setstate__(self, *state: Any) -> None:
        """Nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing."""

    def append(self, *items: Any) -> None:
        """Nothing."""

    extend = add = append


def read_torch(path: Path) -> Any:
    """What torch.save has written to a file: dicts, lists, numbers, strings, and tensors as arrays that cannot be written.

    Args:
      path: of a .pt, .pth, .bin or .ckpt file, in the zip format or in that of torch before 1.6.

    Raises:
      UsageError: the file is missing, damaged or of another format.
    """
    try:
        with path.open("rb") as file:
            start = file.read(32)
        if LEGACY_MAGIC in start:
            with path.open("rb") as file:
                return _read_legacy(file, path.stat().st_size)
        if not start.startswith(ZIP_MAGIC):
            raise UsageError(f"{path} is no file of torch.save; give a .safetensors, .pt or .pth file.")
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); give the path of a file.") from error
    except UsageError:
        raise
    except Exception as error:  # damage shows as almost any exception of zip and pickle
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UsageError(f"{path} is damaged or no file of torch.save ({reason}); download it again.") from error


def _read(archive: zipfile.ZipFile, path: Path) -> Any:
    names = set(archive.namelist())
    found = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} entries data.pkl")
    root = found[0].removesuffix("data.pkl")
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
    machine = _Machine(io.BytesIO(archive.read(found[0])), _Storages(archive, path, root, order))
    return machine.load()


def _read_legacy(file: io.BufferedReader, size: int) -> Any:
    """Five pickles (a number, a version, facts of the machine, the tree, the keys of its storages), then the storages' values."""
    storages = _Streamed(size)
    _, _, facts, tree, keys = (_Machine(file, storages).load() for _ in range(5))
    if not isinstance(facts, dict) or not facts.get("little_endian") or not isinstance(keys, list):
        raise ValueError("bytes in big-endian order, or no list of storages")
    storages.fill(file, keys)
    return tree


class _Streamed:
    """The values of tensors whose file has them one after another behind the tree: zeros until they are filled in."""

    def __init__(self, file_size: int):
        self._left, self._arrays = file_size, dict[str, np.ndarray]()

    def read(self, dtype: np.dtype, key: str, size: int) -> np.ndarray:
        """[size] zeros."""
        self._left -= max(size, 0) * dtype.itemsize
        if size < 0 or self._left < 0 or key in self._arrays:
            raise ValueError(f"storage {key!r} is shorter than its tensors")
        self._arrays[key] = np.zeros(size, dtype)
        return self._arrays[key]

    def fill(self, file: io.BufferedReader, keys: list[Any]) -> None:
        """Reads the values of all storages: of each its size as eight bytes, then its bytes."""
        for key in keys:
            values = self._arrays.pop(key).view(np.uint8)
            (size,) = struct.unpack("<q", file.read(8))
            found = file.read(len(values))
            if size < 0 or len(found) != len(values) or size > 0 and len(values) % size:
                raise ValueError(f"storage {key!r} is shorter than its tensors")
            values[:] = np.frombuffer(found, np.uint8)
        if self._arrays:
            raise ValueError(f"storage {next(iter(self._arrays))!r} is missing")


@dataclasses.dataclass(frozen=True)
class _Storages:
    """The values of tensors, by the keys that the pickle has for them.

    Attributes:
      archive: the open file.
      path: its path.
      root: the folder inside it, with a slash.
      order: "little" or "big", the order of bytes.
    """

    archive: zipfile.ZipFile
    path: Path
    root: str
    order: str

    def read(self, dtype: np.dtype, key: str, size: int) -> np.ndarray:
        """[size] values: a view of the file, or a copy where they are compressed."""
        entry = self.archive.getinfo(f"{self.root}data/{key}")
        if not 0 <= size * dtype.itemsize <= entry.file_size:
            raise ValueError(f"storage {key!r} is shorter than its tensors")
        if self.order == "big":
            dtype = dtype.newbyteorder(">")
        if entry.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self.archive.read(entry), dtype, size)
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            start = entry.header_offset + 30 + sum(_LOCAL_HEADER.unpack(file.read(30)))
        return np.frombuffer(self.mapped, dtype, size, start)

    @functools.cached_property
    def mapped(self) -> np.ndarray:
        """The bytes of the file."""
        return np.memmap(self.path, np.uint8, "r")


class _Machine(pickle.Unpickler):
    """Reads a pickle in which only the names below mean something."""

    def __init__(self, file: io.BytesIO | io.BufferedReader, storages: _Storages | _Streamed):
        super().__init__(file, encoding="utf-8")
        self._storages = storages
        self._read: dict[tuple[str, str], np.ndarray] = {}
        self._globals: dict[str, Any] = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch.Size": lambda *items: tuple(*items),
            "torch._utils._rebuild_tensor": lambda *args: _rebuild(
                *args
            ),  # a pickle may set attributes of what it calls
            "torch._utils._rebuild_tensor_v2": lambda *args: _rebuild(*args),
            "torch._utils._rebuild_parameter": lambda data, *rest: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        """A name's meaning here: never what it means in Python."""
        full = f"{module}.{name}"
        if full not in self._globals:
            self._globals[full] = type(name, (Inert,), {"__module__": module, "storage": STORAGES.get(full)})
        return self._globals[full]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage, [size]; the same one for the same key."""
        kind, storage, key, _, size, *view = pid
        dtype = getattr(storage, "storage", None)
        if kind != "storage" or dtype is None:
            raise ValueError(f"a storage of the unknown kind {getattr(storage, '__name__', kind)!r}")
        if any(part is not None for part in view):
            raise ValueError(f"storage {key!r} is a view of another")
        place = (key, dtype.name)
        if place not in self._read:
            self._read[place] = self._storages.read(dtype, key, size)
        return self._read[place]


def _rebuild(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any
) -> np.ndarray:
    """A tensor: a view of a storage, checked to lie inside it. Offset and strides count elements."""
    if not isinstance(storage, np.ndarray) or len(shape) != len(strides):
        raise ValueError("a tensor without a storage")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    inside = min((offset, *shape, *strides)) >= 0 and (last < storage.size or 0 in shape)
    if not inside:
        raise ValueError("a tensor outside its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(shape), steps, writeable=False)
