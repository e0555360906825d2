"""Images in one NumPy .npz file, read without pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from ar_jax.config import UsageError, nearest
from ar_jax.data.arrays import image_dataset
from ar_jax.data.files import find
from ar_jax.data.protocol import Dataset

USUAL_KEYS = {
    "train_image_key": ("train_images", "x_train", "train_x", "X_train"),
    "train_label_key": ("train_labels", "y_train", "train_y"),
    "test_image_key": ("test_images", "x_test", "test_x", "X_test"),
    "test_label_key": ("test_labels", "y_test", "test_y"),
}


def load_npz(
    path: str,
    train_image_key: str = "",
    train_label_key: str = "",
    test_image_key: str = "",
    test_label_key: str = "",
    label_names: Sequence[str] = (),
) -> Dataset:
    """uint8 images [N, H, W] or [N, H, W, C], and integer labels [N] if there are any.

    Args:
      path: the .npz file.
      train_image_key: the array's name in the file; "" looks for the usual names, such as train_images and x_train.
      train_label_key: without labels under a usual name the data set has no classes.
      test_image_key: as train_image_key.
      test_label_key: as train_label_key.
      label_names: the classes; by default "0", "1", ….

    Raises:
      UsageError: the file is missing, unreadable, needs pickle, or lacks an array; or the arrays do not fit together.
    """
    file = find(path, "set config.data.path to an .npz file with images (Python: numpy.savez_compressed)")
    keys = {
        "train_image_key": train_image_key,
        "train_label_key": train_label_key,
        "test_image_key": test_image_key,
        "test_label_key": test_label_key,
    }
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:  # a lone array: TypeError
            names = {option: _choose(option, key, archive.files, str(file)) for option, key in keys.items()}
            train_images, test_images = (archive[names[key]] for key in ("train_image_key", "test_image_key"))
            train_labels, test_labels = (
                archive[names[key]] if names[key] else None for key in ("train_label_key", "test_label_key")
            )
    except UsageError:
        raise
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{file} is not a complete .npz of plain arrays; save it with numpy.savez_compressed."
        ) from error
    return image_dataset((train_images, train_labels), (test_images, test_labels), str(file), label_names=label_names)


def _choose(option: str, key: str, names: Sequence[str], origin: str) -> str:
    """The array that `option` means: the one asked for, else the first usual one, else "" for labels."""
    if key and key not in names:
        hint = nearest(key, names)
        raise UsageError(f"{origin} has no array config.data.{option}={key!r}.{hint} It has: {', '.join(names)}.")
    found = [key] if key else [name for name in USUAL_KEYS[option] if name in names]
    if not found and "image" in option:
        usual = USUAL_KEYS[option][0]
        raise UsageError(f"{origin} has no {usual}; set config.data.{option} to one of: {', '.join(names)}.")
    return found[0] if found else ""
