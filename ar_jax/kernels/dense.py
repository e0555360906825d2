"""The library's matrix product of activations and weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import linen as nn
from jax import Array

from ar_jax.kernels.dispatch import sequence_axis


def _flat(lhs: Array, rhs: Array, **options: Any) -> Array:
    product = jax.lax.dot_general(lhs.reshape(-1, lhs.shape[-1]), rhs, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*lhs.shape[:-1], rhs.shape[-1])


def _whole(lhs: Array, rhs: Array, **options: Any) -> Array:
    return jax.lax.dot_general(lhs, rhs, (((lhs.ndim - 1,), (0,)), ((), ())), **options)


def dot_general(
    lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """`jax.lax.dot_general` of x [..., D] and a matrix [D, E], for Linen's `dot_general=`.

    On CPUs XLA transposes x before it sums a weight's gradient over several axes, which costs as much as the product:
    there the leading axes are merged first. Elsewhere, and where the mesh cuts sequences, they stay apart, so that each may
    be sharded.
    """
    if dimension_numbers != (((lhs.ndim - 1,), (0,)), ((), ())) or lhs.ndim < 3:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    if sequence_axis() is not None:
        return _whole(lhs, rhs, **options)
    return jax.lax.platform_dependent(
        lhs, rhs, cpu=functools.partial(_flat, **options), default=functools.partial(_whole, **options)
    )


Dense = functools.partial(nn.Dense, dot_general=dot_general)
