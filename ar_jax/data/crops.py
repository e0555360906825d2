"""Crops of pictures and of videos: a few large files cut into many small examples, of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.arrays import image_dataset
from ar_jax.data.files import find
from ar_jax.data.protocol import Dataset

REMEDY = (
    "set config.data.path to pictures or videos, or leave it out for the two photographs that come with scikit-learn"
)
LUMA = np.asarray([0.299, 0.587, 0.114])  # ITU-R BT.601


def load_crops(
    path: str | Sequence[str] = "",
    num_frames: int = 0,
    height: int = 16,
    width: int = 16,
    shrink: int = 1,
    grey: bool = True,
    test_fraction: float = 0.2,
) -> Dataset:
    """Every file cut into boxes [height, width, C], or [num_frames, height, width, C], that do not overlap; a class a file.

    Of a video the last frames are held out, of a picture its right side. What fills no box is left out.

    Args:
      path: files; "" takes scikit-learn's photographs "china.jpg" and "flower.jpg". Pillow reads pictures and moving ones
        (GIF, WebP, PNG); other videos need the package imageio with ffmpeg.
      num_frames: of a video; 0 takes pictures, the first of each file.
      height: of a box.
      width: of a box.
      shrink: so many pixels a side become one first, their mean.
      grey: one channel, the luma, instead of three.
      test_fraction: held out.

    Raises:
      UsageError: numbers out of their range, a file that is missing or not readable, or one that fills no box.
    """
    for name, value, least in (
        ("num_frames", num_frames, 0),
        ("height", height, 1),
        ("width", width, 1),
        ("shrink", shrink, 1),
    ):
        if value < least:
            raise UsageError(f"config.data.{name}={value} must be at least {least}.")
    if not 0 < test_fraction < 1:
        raise UsageError(f"config.data.test_fraction={test_fraction} must lie between 0 and 1.")
    files = [path] if isinstance(path, str) else list(path)
    files = [str(find(file, REMEDY)) for file in files] if files and files != [""] else _photographs()
    box = (max(num_frames, 1), height, width)
    parts: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "test": ([], [])}
    for number, file in enumerate(files):
        frames = _frames(file, num_frames == 0, shrink, grey)
        axis = 0 if num_frames else 2
        cut = round(frames.shape[axis] * (1 - test_fraction))
        for split, piece in zip(parts, np.split(frames, [cut], axis=axis), strict=True):
            boxes = boxes_of(piece, box)
            if not len(boxes):
                raise UsageError(
                    f"{file} has {piece.shape[:3]} frames, rows and columns for {split}, which fill no box of {box}; "
                    "reduce config.data.shrink, num_frames, height or width."
                )
            parts[split][0].append(boxes if num_frames else boxes[:, 0])
            parts[split][1].extend([number] * len(boxes))
    train, test = ((np.concatenate(boxes), np.asarray(labels)) for boxes, labels in parts.values())
    names = [Path(file).stem for file in files]
    return image_dataset(train, test, ", ".join(names), label_names=names, modality="video" if num_frames else "image")


def boxes_of(frames: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
    """[F, H, W, C] cut into boxes, [N, *box, C], frame by frame and row by row; what fills none is dropped."""
    counts = [length // side for length, side in zip(frames.shape[:3], box, strict=True)]
    whole = frames[tuple(slice(0, n * side) for n, side in zip(counts, box, strict=True))]
    shape = [size for pair in zip(counts, box, strict=True) for size in pair]
    apart = whole.reshape(*shape, frames.shape[3]).transpose(0, 2, 4, 1, 3, 5, 6)
    return apart.reshape(-1, *box, frames.shape[3])


def _photographs() -> list[str]:
    """The files of the two photographs that come with scikit-learn."""
    from sklearn import datasets

    folder = Path(datasets.__file__).with_name("images")
    return [str(folder / name) for name in ("china.jpg", "flower.jpg")]


def _frames(file: str, still: bool, shrink: int, grey: bool) -> np.ndarray:
    """[F, H, W, C] uint8."""
    found = []
    for frame in _read(file):
        pixels = frame.astype(np.float32) @ LUMA[:, None] if grey else frame.astype(np.float32)
        rows, cols = (length // shrink for length in pixels.shape[:2])
        blocks = pixels[: rows * shrink, : cols * shrink].reshape(rows, shrink, cols, shrink, -1)
        found.append(np.round(blocks.mean(axis=(1, 3))).astype(np.uint8))
        if still:
            break
    return np.stack(found)


def _read(file: str) -> Iterator[np.ndarray]:
    """The frames of a file, [H, W, 3] uint8 each."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            yield from (np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened))
        return
    except UnidentifiedImageError:
        pass
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error}); {REMEDY}.") from error
    yield from _read_video(file)


def _read_video(file: str) -> Iterator[np.ndarray]:
    try:
        import imageio.v3 as imageio

        frames: Any = imageio.imiter(file, plugin="FFMPEG")
        yield from frames
    except ImportError as error:
        raise UsageError(f"{file} is no picture, and videos need imageio: pip install 'imageio[ffmpeg]'.") from error
    except (OSError, ValueError, RuntimeError) as error:  # what ffmpeg says of a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(f"{file} is no picture or video that can be read ({reason}); {REMEDY}.") from error
