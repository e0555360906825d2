"""Inception v3 as FID knows it (arXiv:1512.00567, arXiv:1706.08500): the network of 2015-12-05 with 1008 classes.

It differs from the Inception v3 that torchvision trains. Means over 3 x 3 places count the places inside the image only, the last
block takes the maximum instead, images are scaled to 299 x 299 as TensorFlow 1 did (no half pixels, no aligned corners) and to
(v - 128) / 128. What evaluators of generators read (arXiv:2105.05233):

    pool           the mean over places of the last block, "pool_3", 2048 numbers
    spatial        the first 7 channels of the first branch of the block "mixed_6", 7 x 17 x 17 numbers (arXiv:2103.03841)
    probabilities  softmax(W pool): the classifier without its bias
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.data.files import find
from ar_jax.interop.files import read_file

SIDE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_BLOCK = "Mixed_6d"
EPSILON = 1e-3  # of the batch norms
REMEDY = (
    "set config.eval.samples.inception to a file with the weights of TensorFlow's Inception of 2015-12-05 under the names of the "
    "PyTorch port, such as pt_inception-2015-12-05-6726825d.pth, or config.eval.samples.features to 'small'"
)

Weights = Mapping[str, np.ndarray]
Params = dict[str, dict[str, Any]]
# A branch is a chain of convolutions; a set at its end reads the chain's output side by side.
Chain = Sequence[str | tuple[str, ...]]
# The branches of each kind of block, in the order of its output channels; "pool" is what a block does in place of a convolution.
INNER: dict[str, dict[str, Chain]] = {
    "A": {
        "1x1": ["branch1x1"],
        "5x5": ["branch5x5_1", "branch5x5_2"],
        "3x3": ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
        "pool": ["branch_pool"],
    },
    "C": {
        "1x1": ["branch1x1"],
        "7x7": ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
        "twice": [f"branch7x7dbl_{i}" for i in range(1, 6)],
        "pool": ["branch_pool"],
    },
    "E": {
        "1x1": ["branch1x1"],
        "3x3": ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
        "twice": ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
        "pool": ["branch_pool"],
    },
}
# Blocks that halve the grid: the last convolution of each chain has stride 2.
HALVING: dict[str, dict[str, Chain]] = {
    "B": {"3x3": ["branch3x3"], "twice": ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]},
    "D": {"3x3": ["branch3x3_1", "branch3x3_2"], "7x7": [f"branch7x7x3_{i}" for i in range(1, 5)]},
}
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
BLOCKS = {
    "Mixed_5b": "A", "Mixed_5c": "A", "Mixed_5d": "A", "Mixed_6a": "B", "Mixed_6b": "C", "Mixed_6c": "C",
    "Mixed_6d": "C", "Mixed_6e": "C", "Mixed_7a": "D", "Mixed_7b": "E", "Mixed_7c": "E",
}  # fmt: skip
MAXIMUM = "Mixed_7c"  # the block that takes maxima where the others of its kind take means


def read_inception(path: str) -> tuple[Params, str]:
    """The network's parameters from a file, and the sha256 of its weights.

    Raises:
      UsageError: the file is missing or damaged, or holds another network.
    """
    weights = {
        name: array
        for name, array in read_file(find(path, REMEDY)).items()
        if not name.endswith("num_batches_tracked") and name != "fc.bias"
    }
    wanted = _names()
    missing, unknown = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or unknown:
        found = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which this network has not"
        raise UsageError(f"{path} {found}; {REMEDY}.")
    if len(weights["fc.weight"]) != NUM_CLASSES:
        raise UsageError(f"{path} has {len(weights['fc.weight'])} classes, not {NUM_CLASSES}; {REMEDY}.")
    return from_official(weights), digest(weights)


def digest(weights: Weights) -> str:
    """The sha256 of arrays by name: of names, dtypes, shapes and values, however a file has packed them."""
    found = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def from_official(weights: Weights) -> Params:
    """Parameters from arrays by the names of the PyTorch port; widths are those of the arrays.

    Returns:
      `kernel` [h, w, in, out] of each convolution, `scale` and `shift` [out], which its batch norm comes to, and `fc/kernel`.
    """
    params: Params = {"fc": {"kernel": np.ascontiguousarray(weights["fc.weight"].T)}}
    for name in _convolutions():
        kernel, gain, bias, mean, variance = (np.asarray(weights[f"{name}.{part}"], np.float64) for part in _PARTS)
        scale = gain / np.sqrt(variance + EPSILON)
        made = {"kernel": kernel.transpose(2, 3, 1, 0), "scale": scale, "shift": bias - mean * scale}
        params[name] = {key: value.astype(np.float32) for key, value in made.items()}
    return params


def inception(params: Params, images: Array) -> dict[str, Array]:
    """What the network says of images.

    Args:
      params: see `from_official`.
      images: [B, H, W, 1 or 3], values 0 to 255.

    Returns:
      `pool` [B, 2048], `spatial` [B, 7 x 17 x 17] and `probabilities` [B, 1008], float32.
    """
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    x = (resize_as_tensorflow_1(images, SIDE) - 128) / 128
    for name, stride, padding in zip(STEM, (2, 1, 1, 1, 1), ("VALID", "VALID", "SAME", "VALID", "VALID"), strict=True):
        x = _convolve(params[name], x, stride, padding)
        if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
            x = _maximum(x, 2, "VALID")
    spatial = x
    for name, kind in BLOCKS.items():
        parts = {key.removeprefix(f"{name}."): value for key, value in params.items() if key.startswith(f"{name}.")}
        if name == SPATIAL_BLOCK:
            spatial = _convolve(parts["branch1x1"], x)[..., :SPATIAL_CHANNELS]
        x = _halved(parts, HALVING[kind], x) if kind in HALVING else _mixed(parts, INNER[kind], x, name == MAXIMUM)
    pool = x.mean(axis=(1, 2))
    logits = jnp.matmul(pool, params["fc"]["kernel"], precision=jax.lax.Precision.HIGHEST)
    return {
        "pool": pool,
        "spatial": spatial.reshape(len(spatial), -1),
        "probabilities": jax.nn.softmax(logits, axis=-1),
    }


def resize_as_tensorflow_1(images: Array, side: int) -> Array:
    """[B, H, W, C] to [B, side, side, C], linear between the two pixels around i * H / side, whose centres are whole numbers."""
    rows, columns = (_between(size, side) for size in images.shape[1:3])
    places = "oh,bhwc,pw->bopc"
    return jnp.einsum(places, rows, images.astype(jnp.float32), columns, precision=jax.lax.Precision.HIGHEST)


def _between(size: int, side: int) -> np.ndarray:
    """[side, size] weights of the old pixels in the new ones. TensorFlow computes the places in float32."""
    place = np.arange(side, dtype=np.float32) * (np.float32(size) / np.float32(side))
    low = np.minimum(place.astype(np.int64), size - 1)
    high, share = np.minimum(low + 1, size - 1), place - low
    weights = np.zeros((side, size), np.float32)
    np.add.at(weights, (np.arange(side), low), 1 - share)
    np.add.at(weights, (np.arange(side), high), share)
    return weights


_PARTS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def _convolutions() -> list[str]:
    """The names of all convolutions."""
    blocks = [
        f"{name}.{part}"
        for name, kind in BLOCKS.items()
        for chain in (INNER | HALVING)[kind].values()
        for link in chain
        for part in ([link] if isinstance(link, str) else link)
    ]
    return [*STEM, *blocks]


def _names() -> list[str]:
    return ["fc.weight", *(f"{name}.{part}" for name in _convolutions() for part in _PARTS)]


def _convolve(part: Mapping[str, Any], x: Array, stride: int = 1, padding: str = "SAME") -> Array:
    """relu(batch norm(convolution))."""
    places = ("NHWC", "HWIO", "NHWC")
    strides, exact = (stride, stride), jax.lax.Precision.HIGHEST
    y = jax.lax.conv_general_dilated(x, part["kernel"], strides, padding, dimension_numbers=places, precision=exact)
    return jax.nn.relu(y * part["scale"][None, None, None] + part["shift"][None, None, None])


def _maximum(x: Array, stride: int, padding: str) -> Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _mean(x: Array) -> Array:
    """The mean over 3 x 3 places, of those that are inside."""
    size, once = (1, 3, 3, 1), (1, 1, 1, 1)
    count = jax.lax.reduce_window(jnp.ones((1, *x.shape[1:3], 1)), 0.0, jax.lax.add, size, once, "SAME")
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, size, once, "SAME") / count


def _mixed(parts: Params, branches: Mapping[str, Chain], x: Array, maximum: bool) -> Array:
    outputs = []
    for kind, chain in branches.items():
        y = x if kind != "pool" else _maximum(x, 1, "SAME") if maximum else _mean(x)
        for link in chain:
            names = [link] if isinstance(link, str) else link
            y = jnp.concatenate([_convolve(parts[name], y) for name in names], axis=-1)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=-1)


def _halved(parts: Params, branches: Mapping[str, Chain], x: Array) -> Array:
    outputs = []
    for chain in branches.values():
        *links, last = (str(link) for link in chain)
        y = x
        for link in links:
            y = _convolve(parts[link], y)
        outputs.append(_convolve(parts[last], y, 2, "VALID"))
    return jnp.concatenate([*outputs, _maximum(x, 2, "VALID")], axis=-1)
