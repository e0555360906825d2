"""What the replays of sequence mixers need: a mixer with official weights, fed whole or token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.interop.kinds import Arrays
from ar_jax.interop.rules import Rules
from ar_jax.interop.transfer import to_ours
from ar_jax.mixers.protocol import Tokens

Outputs = dict[str, Any]


def tokens_of(length: int, first: int = 0) -> Tokens:
    """Tokens that come one after the other and are all remembered."""
    index = first + jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length, row=index)


def swapped(x: Any) -> Array:
    """[T, B, C] to [B, T, C] and back."""
    return jnp.swapaxes(jnp.asarray(x), 0, 1)


def params_of(module: Any, rules: Rules, weights: Arrays, *args: Any, method: Any = "__call__") -> Any:
    """The variables of a Linen module from official weights; `args` are those of its method."""
    like = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, method=method)).get("params", {})
    return {"params": jax.tree.map(jnp.asarray, to_ours(rules, weights, like).params)}


def whole(module: Any, variables: Any, x: Any, *args: Any, method: str = "__call__") -> Array:
    """What a mixer gives for a sequence [B, T, D]; `args` of its method follow x."""
    x = jnp.asarray(x)
    return jax.jit(lambda v, x, args: module.apply(v, x, *args, tokens_of(x.shape[1]), method=method)[0])(
        variables, x, args
    )


def one_by_one(module: Any, variables: Any, x: Any, *args: Any, method: str = "__call__") -> Array:
    """What a mixer gives for a sequence [B, T, D] that is fed token by token; `args` [B, T, ...] likewise."""
    x = jnp.asarray(x)
    batch, length = x.shape[:2]

    def step(state: Any, fed: Sequence[Array]) -> tuple[Any, Array]:
        index, *now = fed
        tokens = Tokens(index[None, None], index[None, None, None], 1, row=index[None, None])
        out, state = module.apply(variables, *(a[:, None] for a in now), tokens, state, method=method)
        return state, out[:, 0]

    @jax.jit
    def run(fed: Sequence[Array]) -> Array:
        return jax.lax.scan(step, module.init_state(batch, length, 1), fed)[1]

    fed = (x, *(jnp.asarray(a) for a in args))
    return swapped(run((jnp.arange(length, dtype=jnp.int32), *(jnp.swapaxes(a, 0, 1) for a in fed))))
