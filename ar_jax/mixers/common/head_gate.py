"""The gate behind the norm of what each head of a memory gave."""

from __future__ import annotations

from collections.abc import Callable

from flax import linen as nn
from jax import Array

GATES: dict[str, Callable[[Array], Array] | None] = {"none": None, "silu": nn.silu, "sigmoid": nn.sigmoid}


def gated(kind: str, x: Array, gate: Array | None) -> Array:
    """x times the opened gate, of x's shape and by one of GATES; x itself without one."""
    opened = GATES[kind]
    return x if opened is None or gate is None else x * opened(gate)
