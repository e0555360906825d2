"""Pictures of samples: a labelled grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[..., C] in [-1, 1] to uint8 [..., 3]; one channel becomes three."""
    scaled = np.clip((np.asarray(images, np.float32) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    return scaled if scaled.shape[-1] == 3 else np.repeat(scaled[..., :1], 3, axis=-1)


def films(images: np.ndarray) -> np.ndarray:
    """Videos [n, T, H, W, C] with their frames side by side, [n, H, T W, C]; images as they are."""
    if images.ndim < 5:
        return images
    return np.moveaxis(images, 1, 2).reshape(len(images), images.shape[2], -1, images.shape[4])


def grid(rows: Sequence[tuple[str, np.ndarray]], title: str = "", label_inches: float = 1.1) -> np.ndarray:
    """One row of images per label.

    Args:
      rows: labels, and images [n, H, W, C] in [-1, 1], or videos [n, T, H, W, C]; n may differ.
      title: stands above.
      label_inches: width left for the labels.

    Returns:
      uint8 [height, width, 3], the cells large enough to read.
    """
    rows = [(label, films(images)) for label, images in rows]
    columns = max(len(images) for _, images in rows)
    height, width = rows[0][1].shape[1:3]
    inches = 0.6 * columns * max(width / height, 1)
    figure = Figure(figsize=(inches + label_inches + 0.1, 0.6 * len(rows) + (0.5 if title else 0.1)), dpi=100)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows, strict=True):
        for cell in row:
            cell.axis("off")
        for cell, image in zip(row, to_uint8(images), strict=False):
            cell.imshow(image, interpolation="nearest")
        row[0].text(-0.25, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    left, top = label_inches / (inches + label_inches + 0.1), 0.93 if title else 0.99
    figure.subplots_adjust(left=left, right=0.99, bottom=0.01, top=top, wspace=0.05, hspace=0.05)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
