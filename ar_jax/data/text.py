"""Text files as bytes, cut into windows of one length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.arrays import TextArrays
from ar_jax.data.files import find, read_bytes
from ar_jax.data.protocol import Dataset

REMEDY = "set config.data.path to a text file, or to a list of them"


def load_text(path: str | Sequence[str], length: int = 256, test_fraction: float = 0.1) -> Dataset:
    """The bytes of one file, or of several in the order given, as windows that do not overlap.

    The last `test_fraction` of the bytes is held out; of both parts, what does not fill a last window is left out.

    Args:
      path: a file or a list of files.
      length: bytes in a window.
      test_fraction: between 0 and 1, both excluded.

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
    text = np.frombuffer(b"".join(read_bytes(find(file, REMEDY), REMEDY) for file in paths), np.uint8)
    num_train = len(text) - round(len(text) * test_fraction)
    train, test = _windows(text[:num_train], length), _windows(text[num_train:], length)
    if not len(train) or not len(test):
        raise UsageError(
            f"{', '.join(paths)}: {num_train} training bytes and {len(text) - num_train} test bytes do not both "
            f"fill a window of {length}; reduce config.data.length or give more text."
        )
    return Dataset("text", (length,), train=TextArrays(train), test=TextArrays(test))


def _windows(text: np.ndarray, length: int) -> np.ndarray:
    """The whole windows in `text`: uint8 [N, length]."""
    return text[: len(text) // length * length].reshape(-1, length)
