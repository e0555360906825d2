"""What samples are compared with: images of the data set, or a file of statistics as the evaluator of ADM publishes them."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.files import find
from ar_jax.data.protocol import Dataset, Source
from ar_jax.evaluation.features import Features
from ar_jax.evaluation.statistics import Gaussian, Moments

SPLITS = ("train", "test")
MANIFOLD = 10_000  # images of a data set that make its manifold, as many as ADM's files hold
BATCH_SIZE = 512
FEATURES_SHA256 = "features_sha256"  # ours: the weights that a file's statistics are of
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
REMEDY = (
    "set config.eval.samples.reference to 'train', 'test', or an .npz file that holds images as uint8 'arr_0' [N, H, W, 3], "
    "statistics as 'mu', 'sigma', 'mu_s' and 'sigma_s', or both"
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images, by their features.

    Attributes:
      name: "train", "test", or the name of a file.
      sha256: of the images, or of the file.
      pool: statistics of the features; `count` is 0 where a file does not tell it.
      spatial: of the spatial features, or None where a file has none.
      manifold: [N, D] features of single images, or None where a file has no images.
    """

    name: str
    sha256: str
    pool: Gaussian
    spatial: Gaussian | None
    manifold: np.ndarray | None


def open_reference(name: str, data: Dataset, features: Features, rounded: bool) -> Callable[[], Reference]:
    """Checks that a reference is there and fits; what it returns computes its statistics.

    Args:
      name: "train" or "test" images of the data set, or an .npz file.
      data: the data set.
      features: what describes images.
      rounded: images of the data set are rounded to whole values 0 to 255, as files of images are.

    Raises:
      UsageError: a file is missing, damaged, needs pickle, or its images or statistics do not fit the features.
    """
    if name not in SPLITS:
        file = find(name, REMEDY)
        arrays, sha256 = _read(file)
        _check(file, arrays, data, features)
        return lambda: _of_file(file.name, sha256, arrays, features)
    if "image" not in getattr(data, name)[0]:
        raise UsageError(f"config.eval.samples.reference={name!r} are tokens, not images; {REMEDY}.")
    return lambda: _of_source(name, getattr(data, name), features, rounded)


def images_of(source: Source) -> Iterator[np.ndarray]:
    """All images of a source in its order, [B, H, W, C] in [-1, 1]."""
    for first in range(0, len(source), BATCH_SIZE):
        yield np.asarray(source.take(np.arange(first, min(first + BATCH_SIZE, len(source))))["image"])


def to_values(images: np.ndarray, rounded: bool) -> np.ndarray:
    """Images in [-1, 1] as float32 values 0 to 255: whole ones, as a PNG file would hold, or as they are."""
    values = (np.asarray(images, np.float32) + 1) * np.float32(127.5)
    return np.clip(values, 0, 255).round() if rounded else values


def _of_source(name: str, source: Source, features: Features, rounded: bool) -> Reference:
    found, chosen = hashlib.sha256(), np.isin(np.arange(len(source)), manifold_of(source))

    def batches() -> Iterator[np.ndarray]:
        for images in images_of(source):
            values = to_values(images, rounded)
            found.update(np.ascontiguousarray(values.astype(np.uint8) if rounded else values).tobytes())
            yield values

    pool, spatial, manifold = _collect(features, batches(), chosen)
    return Reference(name, found.hexdigest(), pool, spatial, manifold)


def manifold_of(source: Source) -> np.ndarray:
    """The images of a source that make its manifold: at most MANIFOLD at random, always the same, in their order."""
    return np.sort(np.random.default_rng(0).permutation(len(source))[:MANIFOLD])


def _of_file(name: str, sha256: str, arrays: Mapping[str, np.ndarray], features: Features) -> Reference:
    """Statistics that a file tells go before those of its images: ADM's are of the whole training set."""
    told, images, manifold = {kind: _told(arrays, kind) for kind in STATISTICS}, arrays.get("arr_0"), None
    if images is not None:
        parts = (images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE))
        pool, spatial, manifold = _collect(features, parts)
        told = {"pool": pool, "spatial": spatial} if told["pool"] is None else told
    assert told["pool"] is not None  # _check has seen to it
    return Reference(name, sha256, told["pool"], told["spatial"], manifold)


def _collect(
    features: Features, batches: Iterator[np.ndarray], chosen: np.ndarray | None = None
) -> tuple[Gaussian, Gaussian, np.ndarray]:
    """Statistics of all images, and the features of those that are chosen."""
    moments: dict[str, Moments] = {}
    points, first = [], 0
    for found in features.of(batches):
        for name in STATISTICS:
            moments.setdefault(name, Moments(found[name].shape[1])).add(found[name])
        here = slice(first, first + len(found["pool"]))
        points.append(found["pool"] if chosen is None else found["pool"][chosen[here]])
        first = here.stop
    return moments["pool"].gaussian(), moments["spatial"].gaussian(), np.concatenate(points)


def _read(file: Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays that mean something, and the sha256 of the file."""
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                names = ("arr_0", FEATURES_SHA256, *(name for pair in STATISTICS.values() for name in pair))
                return {name: archive[name] for name in names if name in archive}, sha256
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{file} is not a complete .npz of plain arrays; {REMEDY}.") from error


def _check(file: Path, arrays: Mapping[str, np.ndarray], data: Dataset, features: Features) -> None:
    images = arrays.get("arr_0")
    if images is None and _told(arrays, "pool") is None:
        raise UsageError(f"{file} has neither arr_0 nor mu and sigma; {REMEDY}.")
    shape = tuple(data.shape)
    if images is not None:
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise UsageError(f"{file} has images of type {images.dtype} and shape {images.shape}; {REMEDY}.")
        shape = images.shape[1:]
        if features.kind == "small" and shape != tuple(data.shape):
            raise UsageError(
                f"{file} has images {shape}, but the classifier reads {tuple(data.shape)}; give another file, or set "
                "config.eval.samples.features='inception'."
            )
    made_with = str(arrays.get(FEATURES_SHA256, features.sha256))
    if made_with != features.sha256:
        raise UsageError(
            f"{file} was made with features of sha256 {made_with[:16]}..., not {features.sha256[:16]}...; make it again."
        )
    sizes = features.sizes(shape)
    for kind in STATISTICS:
        told = _told(arrays, kind)
        if told and told.covariance.shape != (sizes[kind],) * 2:
            raise UsageError(
                f"{file} has statistics of {len(told.mean)} numbers, but config.eval.samples.features={features.kind!r} gives "
                f"{sizes[kind]}; give a file of the same features."
            )


def _told(arrays: Mapping[str, np.ndarray], kind: str) -> Gaussian | None:
    """The statistics that a file has of a kind of features."""
    mean, covariance = (arrays.get(name) for name in STATISTICS[kind])
    if mean is None or covariance is None:
        return None
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64), 0)
