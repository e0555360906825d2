"""FLOPs of a function, counted on its jaxpr: XLA's own cost analysis counts a loop's body once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# Primitives that only move, choose or describe numbers. All others cost one FLOP per element, products excepted.
MOVES = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice", "dynamic_update_slice",
    "gather", "get", "iota", "optimization_barrier", "pad", "reshape", "rev", "scatter", "select_n", "slice", "split",
    "squeeze", "stop_gradient", "swap", "transpose",
}  # fmt: skip


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of one call.

    A product of matrices of M x K and K x N numbers counts 2 M K N, a Fourier transform of N numbers 5 N log2 N; every
    other operation on floating-point numbers counts one per element of its largest array, and moving numbers counts
    nothing. A scan counts its body as often as it runs, a Pallas kernel once per cell of its grid, a branch the dearest
    of its cases.

    Args:
      function: anything traceable; it is not run.
      *args: pytrees of arrays or of `jax.ShapeDtypeStruct`.

    Raises:
      NotImplementedError: a while loop, whose number of turns the jaxpr does not tell.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    params: dict[str, Any] = equation.params
    shapes = [getattr(v.aval, "shape", ()) for v in equation.invars]
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inner(params)]
    match equation.primitive.name:
        case "while":
            raise NotImplementedError(
                "a while loop's number of turns is not in its jaxpr; count one turn's FLOPs instead"
            )
        case "scan":
            return params["length"] * sum(inner)
        case "pallas_call":
            return math.prod(params["grid_mapping"].grid) * sum(inner)
        case "cond":
            return max(inner)
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            return 2 * _largest(equation.outvars) * math.prod(shapes[0][i] for i in contracted)
        case "conv_general_dilated":
            kernel = list(shapes[1])
            del kernel[params["dimension_numbers"].rhs_spec[0]]  # the output's channels
            return 2 * _largest(equation.outvars) * math.prod(kernel)
        case "fft":
            numbers = _largest((*equation.invars, *equation.outvars))
            return round(5 * numbers * math.log2(math.prod(params["fft_lengths"])))
    return sum(inner) if inner else _of_elements(equation)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters: of calls, scans, branches, custom derivatives and remat."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _of_elements(equation: JaxprEqn) -> int:
    variables = (*equation.invars, *equation.outvars)
    floating = any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in variables if hasattr(v.aval, "dtype"))
    return _largest(variables) if floating and equation.primitive.name not in MOVES else 0


def _largest(variables: Sequence[Any]) -> int:
    return max((math.prod(v.aval.shape) for v in variables if hasattr(v.aval, "shape")), default=0)
