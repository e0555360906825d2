"""Folders of idx files, the format of MNIST and its relatives (Debian's dataset-fashion-mnist, EMNIST, KMNIST, …)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.arrays import image_dataset
from ar_jax.data.files import find, read_bytes
from ar_jax.data.protocol import Dataset

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
CHOOSE = "set config.data.folder to a folder with the four idx files"
REMEDY = f"fetch it again, or {CHOOSE}"


def load_idx(folder: str = DEBIAN_FOLDER, label_names: Sequence[str] = ()) -> Dataset:
    """Images and labels from `folder`/{train,t10k}-{images-idx3,labels-idx1}-ubyte, each plain or with .gz.

    Args:
      folder: where the four files are; by default where Debian's package dataset-fashion-mnist puts them.
      label_names: the classes; by default "0", "1", ….

    Raises:
      UsageError: a file is missing, empty, truncated or of another format, or they do not fit together.
    """
    path = find(folder, f"install Debian's package dataset-fashion-mnist, or {CHOOSE}")
    train, test = (
        (read_idx(_file(path, f"{part}-images-idx3-ubyte")), read_idx(_file(path, f"{part}-labels-idx1-ubyte")))
        for part in ("train", "t10k")
    )
    return image_dataset(train, test, str(path), label_names=label_names)


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an idx file (gzip if its name ends with .gz).

    Raises:
      UsageError: the file is empty, truncated, unreadable or not an idx file of bytes.
    """
    content = read_bytes(path, REMEDY)
    # Two zero bytes, the type (8: uint8), the number of axes; then each axis' size, big-endian; then the values.
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise UsageError(f"{path} is not an idx file of bytes; {REMEDY}.")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if values.size != np.prod(shape, dtype=np.int64):
        raise UsageError(f"{path} promises {shape} values but holds {values.size}, so it is truncated; {REMEDY}.")
    return values.reshape(shape)


def _file(folder: Path, stem: str) -> Path:
    for name in (stem + ".gz", stem):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"{folder} has no {stem} or {stem}.gz; {CHOOSE}.")
