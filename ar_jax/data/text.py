"""Text files as bytes, cut into windows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.arrays import TextArrays
from ar_jax.data.files import find, read_bytes
from ar_jax.data.protocol import Dataset

REMEDY = "set config.data.path to a text file, or to a list of them"


def load_text(
    path: str | Sequence[str], length: int = 256, test_fraction: float = 0.1, label_files: bool = False
) -> Dataset:
    """The bytes of one file, or of several in the order given, as windows that do not overlap.

    The last `test_fraction` of the bytes is held out; of both parts, what does not fill a last window is left out.

    Args:
      path: a file or a list of files.
      length: bytes in a window.
      test_fraction: between 0 and 1, both excluded.
      label_files: each file is a class, named as the file; of each the last bytes are held out.

    Raises:
      UsageError: a file is missing, empty or unreadable, or a part is shorter than one window.
    """
    if length < 1 or not 0 < test_fraction < 1:
        raise UsageError(
            f"config.data.length={length} and test_fraction={test_fraction} do not cut a text; "
            "use a length of 1 or more and a fraction between 0 and 1."
        )
    paths: Sequence[str] = path if isinstance(path, list | tuple) else [str(path)]
    if not paths:
        raise UsageError(f"config.data.path is an empty list; {REMEDY}.")
    texts = [read_bytes(find(file, REMEDY), REMEDY) for file in paths]
    if not label_files:
        train, test = _cut(b"".join(texts), ", ".join(paths), length, test_fraction)
        return Dataset("text", (length,), train=TextArrays(train), test=TextArrays(test))
    parts = [_cut(text, file, length, test_fraction) for text, file in zip(texts, paths, strict=True)]
    labelled = [_labelled(windows) for windows in zip(*parts, strict=True)]
    names = tuple(Path(file).stem for file in paths)
    return Dataset("text", (length,), label_names=names, train=labelled[0], test=labelled[1])


def _cut(content: bytes, name: str, length: int, test_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The windows to learn from, and those held out."""
    text = np.frombuffer(content, np.uint8)
    num_train = len(text) - round(len(text) * test_fraction)
    train, test = _windows(text[:num_train], length), _windows(text[num_train:], length)
    if not len(train) or not len(test):
        raise UsageError(
            f"{name}: {num_train} training bytes and {len(text) - num_train} test bytes do not both "
            f"fill a window of {length}; reduce config.data.length or give more text."
        )
    return train, test


def _labelled(windows: Sequence[np.ndarray]) -> TextArrays:
    """The windows of all classes, each labelled with the number of its class."""
    labels = np.repeat(np.arange(len(windows), dtype=np.int32), [len(part) for part in windows])
    return TextArrays(np.concatenate(windows), labels)


def _windows(text: np.ndarray, length: int) -> np.ndarray:
    """The whole windows in `text`: uint8 [N, length]."""
    return text[: len(text) // length * length].reshape(-1, length)
