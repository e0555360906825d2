"""What the kernels for GPUs (Pallas on Triton) have in common: blocks that measure powers of two, and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ar_jax.kernels.dispatch import interpreted

SMALLEST = 16  # rows and columns of a product on tensor cores


def padded(size: int, largest: int | None = None) -> int:
    """The next power of two, which blocks must measure, at least SMALLEST and at most `largest`."""
    size = max(SMALLEST, pl.next_power_of_2(size))
    return size if largest is None else min(size, largest)


def load(ref: Any, index: Sequence[Any], shape: Sequence[int], other: Any = 0) -> Array:
    """ref[index], and `other` where that lies outside of the array's own shape, beyond which the ref is padding."""
    index = _slices(index, ref.shape)
    mask = _inside(index, ref.shape, shape)
    return plgpu.load(ref.at[index]) if mask is None else plgpu.load(ref.at[index], mask=mask, other=other)


def store(ref: Any, index: Sequence[Any], value: Array, shape: Sequence[int]) -> None:
    """ref[index] = value, as much of it as lies inside of the array's own shape."""
    index = _slices(index, ref.shape)
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=_inside(index, ref.shape, shape))


def _slices(index: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
    whole = [pl.ds(0, size) if isinstance(i, slice) else i for i, size in zip(index, shape, strict=True)]
    return tuple(np.int32(i) if isinstance(i, int) else i for i in whole)


def _inside(index: Sequence[Any], padded_shape: Sequence[int], shape: Sequence[int]) -> Array | None:
    """Which elements of ref[index] lie inside of the shape; None if all do."""
    axes = [
        (i, size, limit) for i, size, limit in zip(index, padded_shape, shape, strict=True) if isinstance(i, pl.Slice)
    ]
    sizes = tuple(i.size for i, *_ in axes)
    inside = None
    for axis, (i, size, limit) in enumerate(axes):
        if size != limit:
            place = i.start + jax.lax.broadcasted_iota(jnp.int32, sizes, axis)
            inside = place < limit if inside is None else inside & (place < limit)
    return inside


def product(a: Array, b: Array, contracted: tuple[int, int] = (1, 0)) -> Array:
    """The product of two matrices over one axis of each, summed in float32.

    Matrices of float32 are split into three products of TensorFloat-32, which together keep about float32's accuracy.
    """
    precision: Any = None
    if a.dtype == jnp.float32:
        whole, split = jax.lax.Precision.HIGHEST, jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = whole if interpreted() else split
    dimensions = ((contracted[0],), (contracted[1],)), ((), ())
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
