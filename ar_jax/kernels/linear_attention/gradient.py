"""Linear attention's gradient from a forward and a backward kernel: what every Pallas form has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

Forward = Callable[..., tuple[Array, Array, Any]]
Backward = Callable[..., tuple[Any, ...]]


def differentiable(forward: Forward, backward: Backward) -> Callable[..., tuple[Array, Array]]:
    """A function (options, q, k, v, decay, bonus, state) -> (out, final state) with a backward pass of its own.

    The forward pass keeps its inputs and the memory before each chunk, the backward pass works the rest out anew. How
    arrays are laid out is the kernels' affair.

    Args:
      forward: (options, q, k, v, decay, bonus, state, keep) -> (out, final, before). Options are hashable; decay is a pytree;
        bonus is an array or None; before is the memory before each chunk if keep, else None.
      backward: (options, q, k, v, decay, bonus, before, dout, dfinal, with_decay) -> the gradients of q, k, v, decay, bonus
        and state. Without with_decay nobody asks for that of decay, and None stands for it.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(options: Any, *inputs: Any) -> tuple[Array, Array]:
        out, final, _ = forward(options, *inputs, keep=False)
        return out, final

    def attend_forward(options: Any, *inputs: Any) -> tuple[Any, Any]:
        values = jax.tree.map(lambda x: x.value, inputs)
        asked = jax.tree.map(lambda x: x.perturbed, inputs)
        out, final, before = forward(options, *values, keep=True)
        with_decay = () if any(jax.tree.leaves(asked[3])) else None  # pytrees without leaves: known when traced
        return (out, final), (*values[:5], before, with_decay)

    def attend_backward(options: Any, saved: Any, cotangents: Any) -> tuple[Any, ...]:
        *inputs, before, with_decay = saved
        cotangents = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x,
            cotangents,
            is_leaf=lambda x: isinstance(x, SymbolicZero),
        )
        return backward(options, *inputs, before, *cotangents, with_decay=with_decay is not None)

    attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)
    return attend
