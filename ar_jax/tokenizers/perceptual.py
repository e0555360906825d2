"""How far apart two images look: distances of a fixed network's features (LPIPS, arXiv:1801.03924).

d(x, y) = sum_stages mean_places sum_channels w_c (f_c(x) / |f(x)| - f_c(y) / |f(y)|)^2, features f at the end of each stage.

The paper takes the features of a trained classifier. Where no file of one is at hand, "random" takes a small network of
random weights, always the same ones: it compares edges and textures at three resolutions, but nobody has shown that its
distances are those that people see. Its numbers cannot be compared with published LPIPS.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ar_jax.config import UsageError
from ar_jax.data.files import find

RANDOM = "random"
# ImageNet's colours for images in [-1, 1], as the paper's authors round them.
_SHIFT = np.asarray([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.asarray([0.458, 0.448, 0.450], np.float32)
_CONV = re.compile(r"features\.(\d+)\.weight$")
_LINEAR = re.compile(r"lins?\.?(\d+)\.(?:model\.1\.)?weight$")
_REMEDY = (
    "set config.objective.perceptual_features to a safetensors file with torchvision's names (features.0.weight, ...), "
    'or to "random"'
)

Convolution = tuple[np.ndarray, np.ndarray]  # kernel [h, w, in, out], bias [out]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Convolutions with ReLUs, in stages between which the resolution is halved by its maxima (arXiv:1409.1556).

    Attributes:
      stages: convolutions of each stage.
      weights: [channels] of each stage: w in the distance.
    """

    stages: tuple[tuple[Convolution, ...], ...]
    weights: tuple[np.ndarray, ...]

    def features(self, images: Array) -> list[Array]:
        """Images [B, H, W, 1 or 3] in [-1, 1] to features [B, h, w, channels] at the end of each stage."""
        x, found = (images - _SHIFT[None, None, None]) / _SCALE[None, None, None], []
        for index, stage in enumerate(self.stages):
            x = nn.max_pool(x, (2, 2), (2, 2)) if index else x
            for kernel, bias in stage:
                places = ("NHWC", "HWIO", "NHWC")
                x = jax.lax.conv_general_dilated(x, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=places)
                x = nn.relu(x + bias[None, None, None])
            found.append(x)
        return found

    def distance(self, x: Array, y: Array) -> Array:
        """The distance of images [B, H, W, C] from others, [B]."""
        pairs = zip(self.features(x), self.features(y), self.weights, strict=True)
        each = [jnp.square(_unit(f) - _unit(g)) @ weights for f, g, weights in pairs]  # [B, h, w]
        return sum((d.mean(axis=(1, 2)) for d in each), jnp.zeros(len(x)))


def random_network(widths: tuple[int, ...] = (16, 32, 64), seed: int = 0) -> FeatureNetwork:
    """The network of random weights: two 3x3 convolutions a stage, of the variance that ReLUs keep (arXiv:1502.01852)."""
    rng, channels, stages = np.random.default_rng(seed), 3, []
    for width in widths:
        stage = []
        for _ in range(2):
            kernel = rng.normal(0, np.sqrt(2 / (9 * channels)), (3, 3, channels, width)).astype(np.float32)
            stage.append((kernel, np.zeros(width, np.float32)))
            channels = width
        stages.append(tuple(stage))
    return FeatureNetwork(tuple(stages), tuple(np.ones(width, np.float32) for width in widths))


def read_network(path: str, weights_path: str = "") -> FeatureNetwork:
    """A trained classifier of VGG's kind: VGG11 to VGG19 or any smaller one of the same form.

    Args:
      path: safetensors with torchvision's names, `features.N.weight` [out, in, h, w] and `features.N.bias`. Numbers count
        ReLUs and poolings, too, so they tell the stages: from one convolution to the next in a stage they rise by 2.
      weights_path: safetensors with w, `linK.model.1.weight` [1, channels, 1, 1] as the paper's authors publish them; ""
        weighs all channels 1.

    Raises:
      UsageError: a file is missing, of another format, or does not fit.
    """
    tensors = _read(path)
    numbers = sorted(int(m[1]) for m in map(_CONV.search, tensors) if m)
    prefix = next((m.string[: m.start()] for m in map(_CONV.search, tensors) if m), "")
    if not numbers or any(f"{prefix}features.{n}.bias" not in tensors for n in numbers):
        raise UsageError(f"{path} has no convolutions features.N.weight with features.N.bias; {_REMEDY}.")
    stages: list[list[Convolution]] = []
    for number, before in zip(numbers, [None, *numbers], strict=False):
        if before is None or number - before > 2:
            stages.append([])
        kernel, bias = (tensors[f"{prefix}features.{number}.{part}"] for part in ("weight", "bias"))
        stages[-1].append((kernel.astype(np.float32).transpose(2, 3, 1, 0), bias.astype(np.float32)))
    widths = [len(stage[-1][1]) for stage in stages]
    return FeatureNetwork(tuple(tuple(s) for s in stages), _read_weights(weights_path, widths))


def _read_weights(path: str, widths: list[int]) -> tuple[np.ndarray, ...]:
    if not path:
        return tuple(np.ones(width, np.float32) for width in widths)
    found = {
        int(m[1]): value.reshape(-1).astype(np.float32) for k, value in _read(path).items() if (m := _LINEAR.search(k))
    }
    if [found[k].size for k in sorted(found)] != widths:
        raise UsageError(
            f"{path} must hold lin0.model.1.weight, ... for stages of {widths} channels; "
            'set config.objective.perceptual_weights to "" to weigh all channels 1.'
        )
    return tuple(found[k] for k in sorted(found))


def _read(path: str) -> dict[str, np.ndarray]:
    try:
        return load_file(find(path, _REMEDY))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is not a complete safetensors file; {_REMEDY}.") from error


def _unit(features: Array) -> Array:
    """Features [..., C] of length 1; what is all zero stays so, with a finite gradient."""
    return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + 1e-10)
