"""Pictures of samples: a labelled grid, and an image that grows in its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Decode = Callable[[np.ndarray, np.ndarray], np.ndarray]


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[..., C] in [-1, 1] to uint8 [..., 3]; one channel becomes three."""
    scaled = np.clip((np.asarray(images, np.float32) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    return scaled if scaled.shape[-1] == 3 else np.repeat(scaled[..., :1], 3, axis=-1)


def grid(rows: Sequence[tuple[str, np.ndarray]], title: str = "") -> np.ndarray:
    """One row of images per label.

    Args:
      rows: labels, and images [n, H, W, C] in [-1, 1]; n may differ.
      title: stands above.

    Returns:
      uint8 [height, width, 3], the cells large enough to read.
    """
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(0.6 * columns + 1.2, 0.6 * len(rows) + (0.5 if title else 0.1)), dpi=100)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows, strict=True):
        for cell in row:
            cell.axis("off")
        for cell, image in zip(row, to_uint8(images), strict=False):
            cell.imshow(image, interpolation="nearest")
        row[0].text(-0.25, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.subplots_adjust(
        left=1.1 / (0.6 * columns + 1.2), right=0.99, bottom=0.01, top=0.93 if title else 0.99, wspace=0.05, hspace=0.05
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def growth(
    tokens: np.ndarray, slots: np.ndarray, sizes: Sequence[int], decode: Decode, frames: int = 12
) -> list[tuple[int, np.ndarray]]:
    """What is known of one image after some of its steps.

    Args:
      tokens: [L] or [L, C], all tokens on their slots.
      slots: [L], in the order of their generation.
      sizes: tokens per step.
      decode: tokens [B, L, ...] and a mask [B, L] of what is known, to images [B, H, W, C].
      frames: at most so many steps are shown, evenly chosen, the last among them.

    Returns:
      Steps done, and the image [H, W, C] after them.
    """
    ends = np.cumsum(sizes)
    shown = np.unique(np.linspace(0, len(ends) - 1, min(frames, len(ends))).round().astype(int))
    known = np.zeros((len(shown), len(slots)), bool)
    for row, step in enumerate(shown):
        known[row, slots[: ends[step]]] = True
    images = decode(np.repeat(tokens[None], len(shown), axis=0), known)
    return [(int(step) + 1, image) for step, image in zip(shown, images, strict=True)]
