"""Data sets that fit in memory: uint8 arrays, turned into examples only when they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.protocol import Dataset, Example, Modality

AXES: dict[str, tuple[str, ...]] = {"image": ("H", "W"), "video": ("T", "H", "W")}


@dataclasses.dataclass(frozen=True)
class ImageArrays:
    """A source of images in memory: `images` uint8 [N, H, W, C] of 0 … levels - 1, `labels` int32 [N].

    `key` is the name of the images in an example; videos, [N, T, H, W, C], have another.
    """

    images: np.ndarray
    labels: np.ndarray
    levels: int = 256
    key: Modality = "image"

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """`image` float32 [H, W, C], or `video` [T, H, W, C], in [-1, 1] and `label` int32 []."""
        return {self.key: to_signed_unit(self.images[index], self.levels), "label": self.labels[index]}

    def take(self, indices: np.ndarray) -> Example:
        """`image` float32 [B, H, W, C], or `video` [B, T, H, W, C], in [-1, 1] and `label` int32 [B]."""
        return {self.key: to_signed_unit(self.images[indices], self.levels), "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class TextArrays:
    """A source of texts in memory: `windows` uint8 [N, length], `labels` int32 [N] where there are classes."""

    windows: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> Example:
        """`text` uint8 [length], and `label` int32 []."""
        return self._of(index)

    def take(self, indices: np.ndarray) -> Example:
        """`text` uint8 [B, length], and `label` int32 [B]."""
        return self._of(indices)

    def _of(self, index: int | np.ndarray) -> Example:
        text = {"text": self.windows[index]}
        return text if self.labels is None else {**text, "label": self.labels[index]}


def to_signed_unit(values: np.ndarray, levels: int) -> np.ndarray:
    """Integers 0 … levels - 1 as float32, evenly from -1 to 1."""
    return values.astype(np.float32) * np.float32(2 / (levels - 1)) - np.float32(1)


def image_dataset(
    train: tuple[np.ndarray, np.ndarray | None],
    test: tuple[np.ndarray, np.ndarray | None],
    origin: str,
    levels: int = 256,
    label_names: Sequence[str] = (),
    modality: Modality = "image",
) -> Dataset:
    """Images and labels as a data set, once they are seen to fit together; videos likewise, with an axis of frames in front.

    Args:
      train: uint8 [N, H, W] or [N, H, W, C], and integer labels [N] or [N, 1], or None where there are none.
      test: the same for the examples held out.
      origin: the file or folder they come from, for messages.
      levels: how many values a pixel can take.
      label_names: the classes; empty means as many as the training labels say, named "0", "1", ….
      modality: "image", or "video" for uint8 [N, T, H, W] or [N, T, H, W, C].

    Raises:
      UsageError: the arrays are empty, of another type or shape, or a label is out of range.
    """
    train_images, test_images = (
        _images(images, f"{origin} ({split})", modality) for split, images in (("train", train[0]), ("test", test[0]))
    )
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UsageError(
            f"{origin} has training images {train_images.shape[1:]} but test images {test_images.shape[1:]}; "
            "give both the same height, width and channels."
        )
    if (train[1] is None) != (test[1] is None):
        raise UsageError(f"{origin} has labels for only one of train and test; give labels for both or for neither.")
    if train[1] is not None and not label_names:
        label_names = [str(label) for label in range(int(np.max(train[1], initial=0)) + 1)]
    if train[1] is None and label_names:
        raise UsageError(f"{origin} has no labels; remove config.data.label_names.")
    train_source, test_source = (
        ImageArrays(images, _labels(labels, len(images), len(label_names), f"{origin} ({split})"), levels, modality)
        for split, images, labels in [("train", train_images, train[1]), ("test", test_images, test[1])]
    )
    return Dataset(modality, train_images.shape[1:], levels, tuple(label_names), train=train_source, test=test_source)


def _images(images: np.ndarray, origin: str, modality: Modality) -> np.ndarray:
    axes = AXES[modality]
    if images.dtype != np.uint8 or images.ndim not in (1 + len(axes), 2 + len(axes)):
        plain = ", ".join(axes)
        raise UsageError(
            f"{origin} has {modality}s of type {images.dtype} and shape {images.shape}; "
            f"save them as uint8 [N, {plain}] or [N, {plain}, C]."
        )
    images = images if images.ndim == 2 + len(axes) else images[..., None]
    if not images.size:
        raise UsageError(f"{origin} has no {modality}s (shape {images.shape}); save at least one.")
    if images.shape[-1] > 4:
        raise UsageError(
            f"{origin} has {images.shape[-1]} channels in its last axis; save {modality}s as [N, {', '.join(axes)}, C]."
        )
    return images


def _labels(labels: np.ndarray | None, count: int, num_classes: int, origin: str) -> np.ndarray:
    if labels is None:
        return np.zeros(count, np.int32)
    if labels.size != count or labels.shape[0] != count or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"{origin} has {count} images but labels of type {labels.dtype} and shape {labels.shape}; "
            "save one integer label per image."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        bad = labels.min() if labels.min() < 0 else labels.max()
        raise UsageError(
            f"{origin} has label {bad}, outside 0 … {num_classes - 1}; mend the labels or set config.data.label_names."
        )
    return labels.reshape(-1).astype(np.int32)
