"""Trains the small classifier of a data set: python -m ar_jax.evaluation.classifier --config=FILE.py[:variant] --out=DIR.

Of the config only `data`, `seed` and `mesh` are used; --config.data.key=value overrides them. More options: --steps=1000,
--batch_size=64, --widths=16,32,64 (channels of each stage). DIR is then what config.eval.samples.classifier takes: weights, and
their sha256, which every result names. A run that was stopped goes on when it is started again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from ar_jax import command, training
from ar_jax.classifier_system import Classification, ClassifierRun, ClassifierSystem
from ar_jax.config import UsageError
from ar_jax.data import pipeline
from ar_jax.data.protocol import Dataset, Facts
from ar_jax.evaluation import classification
from ar_jax.evaluation.small import Small, write_small
from ar_jax.training.workdir import plain_values


def check(data: Facts) -> None:
    """Raises UsageError unless the data set holds images of at least two classes."""
    if data.modality != "image" or data.num_classes < 2:
        raise UsageError(
            "A classifier needs images of at least two classes, which this data set does not have; name another data set with "
            "--config.data.kind, or evaluate with config.eval.samples.features='inception'."
        )


def train_classifier(
    data: Dataset,
    out: str | Path,
    seed: int = 0,
    num_steps: int = 1000,
    batch_size: int = 64,
    widths: Sequence[int] = (16, 32, 64),
    mesh: Mapping[str, int] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains the classifier of a data set and writes it to a folder.

    Args:
      data: images of at least two classes.
      out: the folder; a run in it goes on.
      seed: fixes weights and batches.
      num_steps: of training.
      batch_size: of training.
      widths: channels of each stage.
      mesh: see `config.mesh`.
      origin: what the data is, for the record.

    Returns:
      `sha256` of the weights and `accuracy` on the held-out images.

    Raises:
      UsageError: the data has no classes or no images, or an option is out of its range.
    """
    check(data)
    if "image" not in data.train[0]:
        raise UsageError("A classifier needs images, but the data are tokens; name the images with --config.data.kind.")
    if not widths or min(widths) < 1 or min(data.shape[:2]) >> (len(widths) - 1) < 1:
        raise UsageError(
            f"--widths={list(widths)} must be positive, and halve images of {tuple(data.shape)} to one place at most."
        )
    small, out = Small(tuple(data.shape), data.num_classes, tuple(widths)), Path(out)
    config = ConfigDict(
        dict(
            seed=seed,
            data=dict(origin or {}),
            model=dict(kind="small", widths=tuple(widths)),
            optimizer=dict(kind="adamw", learning_rate=3e-3, weight_decay=0.05, clip_norm=1.0),
            schedule=dict(kind="cosine", warmup_steps=num_steps // 20),
            train=dict(num_steps=num_steps, batch_size=batch_size, log_every_steps=max(num_steps // 10, 1)),
            mesh=dict(mesh or {"data": -1}),
        )
    )
    iterator = pipeline.train_iterator(data, batch_size, seed, training.own_rows(config))
    system = ClassifierSystem(data, small.network, Classification(label_smoothing=0.1, shift=0.125))
    run = ClassifierRun(system, training.fit(system, iterator, config, out).params, config)
    accuracy = classification.held_out(run, data)["accuracy"]
    sha256 = write_small(
        out, small, run.params["classifier"], accuracy=accuracy, num_steps=num_steps, seed=seed, data=origin or {}
    )
    return {"sha256": sha256, "accuracy": accuracy}


def main(arguments: Sequence[str]) -> None:
    """The command."""
    from ar_jax.run import load_data

    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the folder to make", flag_values=values, required=True)
    flags.DEFINE_integer("steps", 1000, "training steps", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "images of a step", flag_values=values, lower_bound=1)
    flags.DEFINE_list("widths", ["16", "32", "64"], "channels of each stage", flag_values=values)
    left = values(arguments, known_only=True)
    config, out = command.parse([*left, f"--workdir={values.out}"])
    try:
        widths = tuple(int(width) for width in values.widths)
    except ValueError as error:
        raise UsageError(f"--widths={','.join(values.widths)} must be whole numbers, such as 16,32,64.") from error
    origin = plain_values(config)["data"]
    found = train_classifier(
        load_data(config),
        out,
        config.seed,
        values.steps,
        values.batch_size,
        widths,
        dict(config.get("mesh") or {"data": -1}),
        origin,
    )
    print(f"classifier: {out} gets {found['accuracy']:.2%} of the held-out images right")
    print(json.dumps(found))


if __name__ == "__main__":
    command.call(main)
