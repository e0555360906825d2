"""Keeps a reference: python -m ar_jax.evaluation.write_reference --config=FILE.py[:variant] --out=NEW.npz --weights=FILE.

The statistics of a large data set are computed once, of its training images (--split=test: of those held out), and written as the
evaluator of ADM publishes them; config.eval.samples.reference takes the file. Of the config only `data` is used. --weights is the
folder of a classifier for --features=small, and the file of Inception's weights for --features=inception.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from ar_jax import command
from ar_jax.config import UsageError
from ar_jax.data.protocol import Dataset
from ar_jax.evaluation.features import Features, read_features
from ar_jax.evaluation.reference import (
    BATCH_SIZE,
    FEATURES_SHA256,
    SPLITS,
    Reference,
    manifold_of,
    open_reference,
    to_values,
)


def write_reference(file: str | Path, split: str, data: Dataset, features: Features) -> Reference:
    """Writes a file that is a reference: statistics of all images, rounded, and the images of the manifold.

    Raises:
      UsageError: the file is there already or cannot be written, or the data are no images.
    """
    file = Path(file)
    if file.exists() or file.suffix != ".npz":
        raise UsageError(f"--out={file} must be a new file whose name ends with .npz; choose another.")
    if split not in SPLITS:
        raise UsageError(f"--split={split!r} must be one of {', '.join(SPLITS)}.")
    reference, source = open_reference(split, data, features, True)(), getattr(data, split)
    assert reference.spatial is not None
    chosen = manifold_of(source)
    parts = [source.take(chosen[i : i + BATCH_SIZE])["image"] for i in range(0, len(chosen), BATCH_SIZE)]
    arrays = {
        "mu": reference.pool.mean,
        "sigma": reference.pool.covariance,
        "mu_s": reference.spatial.mean,
        "sigma_s": reference.spatial.covariance,
        "arr_0": to_values(np.concatenate(parts), True).astype(np.uint8),
        FEATURES_SHA256: np.asarray(features.sha256),
    }
    part = file.with_name(f".{file.stem}.part.npz")
    try:
        np.savez(part, **arrays)  # type: ignore[arg-type]
        part.replace(file)
    except OSError as error:
        raise UsageError(f"Cannot write {file} ({error.strerror or error}); choose another --out.") from error
    finally:
        part.unlink(missing_ok=True)
    return reference


def main(arguments: Sequence[str]) -> None:
    """The command."""
    from ar_jax.run import load_data

    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the file to make", flag_values=values, required=True)
    flags.DEFINE_string("features", "small", "small or inception", flag_values=values)
    flags.DEFINE_string("weights", "", "folder of a classifier, or file of Inception's weights", flag_values=values)
    flags.DEFINE_string("split", "train", "train or test", flag_values=values)
    left = values(arguments, known_only=True)
    config, _ = command.parse([*left, f"--workdir={values.out}"])
    data = load_data(config)
    features = read_features(values.features, values.weights, data)
    reference = write_reference(values.out, values.split, data, features)
    numbers = len(reference.pool.mean)
    print(f"reference: {values.out} holds {reference.pool.count} images' statistics of {numbers} numbers")


if __name__ == "__main__":
    command.call(main)
