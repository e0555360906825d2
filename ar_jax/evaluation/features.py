"""Features of images by name: `small`, a classifier of the data set's own, and `inception`, what published FIDs are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.data.protocol import Facts
from ar_jax.evaluation.inception import inception, read_inception
from ar_jax.evaluation.small import read_small
from ar_jax.training.mesh import make_mesh
from ar_jax.training.sharding import batch_sharding, replicated

BATCH_SIZE = 64  # images on one device


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """A network that describes images.

    Attributes:
      kind: its name in FEATURES.
      sha256: of its weights.
      params: its parameters.
      describe: (params, images [B, H, W, C], values 0 to 255) to `pool`, `spatial` and `probabilities`, each [B, numbers].
    """

    kind: str
    sha256: str
    params: Any
    describe: Callable[[Any, Array], Mapping[str, Array]]

    def of(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Features of images [B, H, W, C], values 0 to 255, batch by batch, computed on all devices; B may differ."""
        for images in batches:
            size = BATCH_SIZE * self._mesh.devices.size
            for first in range(0, len(images), size):
                here = images[first : first + size]
                padded = np.zeros((size, *images.shape[1:]), np.float32)
                padded[: len(here)] = here
                found = self._compiled(self._placed, jax.device_put(padded, batch_sharding(self._mesh)))
                yield {name: np.asarray(values)[: len(here)] for name, values in found.items()}

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """How many numbers each of the features of an image of this shape has."""
        image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        return {name: like.shape[1] for name, like in jax.eval_shape(self.describe, self.params, image).items()}

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return make_mesh({"data": -1})

    @functools.cached_property
    def _placed(self) -> Any:
        own = jax.tree.map(
            np.asarray, self.params
        )  # of numpy: what lies on one device cannot go to those of other processes
        return jax.device_put(own, replicated(self._mesh))

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.describe, out_shardings=replicated(self._mesh))


def read_features(kind: str, path: str, data: Facts) -> Features:
    """The features of a kind, from the folder or file of its weights.

    Args:
      kind: of FEATURES.
      path: the folder of a classifier, or the file of Inception's weights.
      data: the images.

    Raises:
      UsageError: an unknown kind, weights that are missing, damaged or of another network, or images that it cannot read.
    """
    choose(FEATURES, kind, "eval.samples.features")
    return FEATURES[kind](path, data)


def _small(path: str, data: Facts) -> Features:
    small, params, sha256 = read_small(path, data)
    return Features("small", sha256, params, small.features)


def _inception(path: str, data: Facts) -> Features:
    if data.shape[-1] not in (1, 3):
        raise UsageError(
            f"config.eval.samples.features='inception' reads images of 1 or 3 channels, not {data.shape[-1]}; use 'small'."
        )
    params, sha256 = read_inception(path)
    return Features("inception", sha256, params, inception)


FEATURES: dict[str, Callable[[str, Facts], Features]] = {"small": _small, "inception": _inception}
