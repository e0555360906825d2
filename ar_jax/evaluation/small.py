"""A small classifier of a data set's own images, whose features tell samples of other classes, shapes and strokes apart.

Published features are those of a network trained on ImageNet: they are large, and say little of 28 x 28 digits. A classifier
that is trained on the data set itself (`python -m ar_jax.evaluation.classifier`) is the usual answer for small images; its
numbers compare only with those of the same weights, which is why a result names their sha256.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array

from ar_jax.config import UsageError
from ar_jax.data.files import find
from ar_jax.data.protocol import Facts
from ar_jax.evaluation.inception import SPATIAL_CHANNELS, digest
from ar_jax.interop.files import read_safetensors, write_safetensors
from ar_jax.models.vision.pyramid import Classifier, Convolution, Pyramid
from ar_jax.training.paths import named_leaves
from ar_jax.training.workdir import write_atomically

WEIGHTS, RECORD = "classifier.safetensors", "classifier.json"
REMEDY = (
    "set config.eval.samples.classifier to a folder that python -m ar_jax.evaluation.classifier --config=FILE "
    "--out=FOLDER has made"
)


class Residual(nn.Module):
    """x + conv(relu(conv(x))), 3 x 3 places each, with norms over channels."""

    channels: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        y = nn.relu(Convolution(self.channels, 3, 1, name="first")(x, train))
        return nn.relu(x + Convolution(self.channels, 3, 1, name="second")(y, train))


@dataclasses.dataclass(frozen=True)
class Small:
    """What a classifier is, without its weights.

    Attributes:
      shape: (H, W, C) of its images.
      num_classes: of the data set.
      widths: channels of each stage; a stage's grid has half the side of the one before.
    """

    shape: tuple[int, ...]
    num_classes: int
    widths: tuple[int, ...] = (16, 32, 64)

    @functools.cached_property
    def network(self) -> Classifier:
        """The network: a convolution and a residual block a stage."""
        patches = tuple(
            functools.partial(Convolution, width, 3, 2 if stage else 1) for stage, width in enumerate(self.widths)
        )
        blocks = tuple((functools.partial(Residual, width),) for width in self.widths)
        return Classifier(lambda: Pyramid(patches, blocks), lambda: nn.Dense(self.num_classes))

    def init(self, key: Array) -> Any:
        """Fresh parameters."""
        return self.network.init(key, jnp.zeros((1, *self.shape)))["params"]

    def logits(self, params: Any, images: Array) -> Array:
        """Images [B, H, W, C] in [-1, 1] to [B, classes]."""
        return cast(Array, self.network.apply({"params": params}, images))

    def features(self, params: Any, images: Array) -> dict[str, Array]:
        """What the network says of images.

        Args:
          params: see `init`.
          images: [B, H, W, C], values 0 to 255.

        Returns:
          `pool` [B, widths[-1]], the mean over places of the last stage; `spatial`, the first 7 channels of the stage before on its
          grid, [B, h w 7]; `probabilities` [B, classes].
        """

        def both(network: Classifier, images: Array) -> tuple[list[Array], Array]:
            stages = network.backbone(images)
            pool = stages[-1].mean(axis=(1, 2))
            return [*stages, pool], network.head(pool)

        found: Any = self.network.apply({"params": params}, images / 127.5 - 1, method=both)
        (*stages, pool), logits = found
        spatial = stages[max(len(stages) - 2, 0)][..., :SPATIAL_CHANNELS]
        return {
            "pool": pool,
            "spatial": spatial.reshape(len(spatial), -1),
            "probabilities": jax.nn.softmax(logits, axis=-1),
        }


def write_small(folder: Path, small: Small, params: Any, **facts: Any) -> str:
    """Writes a classifier and further facts to a folder.

    Returns:
      The sha256 of its weights.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(jax.device_get(params)).items()}
    write_safetensors(folder / WEIGHTS, arrays)
    record = dataclasses.asdict(small) | {"sha256": digest(arrays)} | facts
    write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return str(record["sha256"])


def read_small(path: str, data: Facts) -> tuple[Small, Any, str]:
    """A classifier, its parameters and the sha256 of them.

    Args:
      path: the folder.
      data: the images that it will see.

    Raises:
      UsageError: there is none, it is damaged, or it was trained on images of another shape or with other classes.
    """
    folder = find(path, REMEDY)
    try:
        record = json.loads((folder / RECORD).read_text())
        small = Small(tuple(record["shape"]), record["num_classes"], tuple(record["widths"]))
        wanted = record["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} holds no classifier ({error}); {REMEDY}.") from error
    arrays = read_safetensors(folder / WEIGHTS)
    if digest(arrays) != wanted:
        raise UsageError(f"{folder / WEIGHTS} is not what {RECORD} beside it says; train the classifier again.")
    if (small.shape, small.num_classes) != (tuple(data.shape), data.num_classes):
        raise UsageError(
            f"{path} classifies images {small.shape} of {small.num_classes} classes, but the data has {tuple(data.shape)} of "
            f"{data.num_classes}; {REMEDY}."
        )
    return small, traverse_util.unflatten_dict(dict(arrays), sep="/"), wanted
