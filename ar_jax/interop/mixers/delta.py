"""Official runs of delta rules and of RWKV's recurrences: operations on queries, keys and values without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs
from ar_jax.kernels.delta_attention import delta_attention, dplr_attention
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.mixers.delta import delta_product


def replay_delta(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The delta rule, whose heads stand in front of its tokens; queries are scaled by 1 / sqrt(H)."""
    q, k, v, beta = (tokens_first(inputs[f"in.{name}"]) for name in ("q", "k", "v", "beta"))
    q = q * q.shape[-1] ** -0.5
    return _all_forms(
        inputs, lambda start, **o: _heads_first(*delta_attention(q, k, v, beta, initial_state=start, **o))
    )


def replay_gated_delta(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The gated delta rule; queries are scaled by 1 / sqrt(H) unless the config tells another scale."""
    q, k, v, beta, g = (jnp.asarray(inputs[f"in.{name}"]) for name in ("q", "k", "v", "beta", "g"))
    scale = meta["config"].get("scale")
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return _all_forms(inputs, lambda start, **o: delta_attention(q, k, v, beta, log_decay=g, initial_state=start, **o))


def replay_delta_product(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The gated delta product, with or without its decay; its queries are as they are, whatever scale the config tells."""
    q, k, v, beta = (jnp.asarray(inputs[f"in.{name}"]) for name in ("q", "k", "v", "beta"))
    g = jnp.asarray(inputs["in.g"]) if "in.g" in inputs else None
    k, v, beta = (a.reshape(*q.shape[:2], -1, *a.shape[2:]) for a in (k, v, beta))
    return _all_forms(inputs, lambda start, **o: delta_product(q, k, v, beta, log_decay=g, initial_state=start, **o))


def replay_rwkv6(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """RWKV-6's recurrence, whose heads stand in front of its tokens."""
    r, k, v, w = (tokens_first(inputs[f"in.{name}"]) for name in ("q", "k", "v", "w"))
    r, bonus = r * meta["config"].get("scale", 1.0), jnp.asarray(inputs["in.u"])

    def run(start: Array | None, **options: Any) -> tuple[Array, Array]:
        return _heads_first(*linear_attention(r, k, v, log_decay=w, bonus=bonus, initial_state=start, **options))

    return _all_forms(inputs, run)


def replay_rwkv7(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """RWKV-7's recurrence, whose heads stand in front of its tokens."""
    r, k, v, a, b, w = (tokens_first(inputs[f"in.{name}"]) for name in ("r", "k", "v", "a", "b", "w"))
    r = r * meta["config"].get("scale", 1.0)

    def run(start: Array | None, **options: Any) -> tuple[Array, Array]:
        return _heads_first(*dplr_attention(r, k, v, a, b, log_decay=w, initial_state=start, **options))

    return _all_forms(inputs, run)


def tokens_first(x: Any) -> Array:
    """[B, N, T, ...] to [B, T, N, ...] and back."""
    return jnp.swapaxes(jnp.asarray(x), 1, 2)


def _heads_first(out: Array, state: Array) -> tuple[Array, Array]:
    return tokens_first(out), state


def _all_forms(inputs: Arrays, run: Callable[..., tuple[Array, Array]]) -> Outputs:
    """Token by token from nothing and from the state that is given, and in chunks from nothing."""
    step_by_step, start = {"implementation": "reference"}, inputs.get("in.h0")
    outputs = dict(zip(("out.o", "out.ht"), run(None, **step_by_step), strict=True))
    outputs |= dict(zip(("out.o_chunk", "out.ht_chunk"), run(None), strict=True))
    if start is not None:
        outputs |= dict(zip(("out.o_h0", "out.ht_h0"), run(jnp.asarray(start), **step_by_step), strict=True))
    return outputs
