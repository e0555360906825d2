"""Official runs of attention to slots: gated slot attention, and attention with bounded memory."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs
from ar_jax.kernels.slot_attention import Slots, slot_attention
from ar_jax.kernels.softmax_memory import NOTHING, running_weights


def replay(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """From empty slots and, where there are some, from given ones; without a gate shares are a running softmax."""
    heads_first = "abc" in meta["class"].lower()
    q, k, v, write = (jnp.asarray(inputs[f"in.{name}"]) for name in "qkvs")
    log_decay = jnp.asarray(inputs["in.g"]) if "in.g" in inputs else None
    if heads_first:
        q, k, v, write = (jnp.swapaxes(a, 1, 2) for a in (q, k, v, write))
        log_decay = None if log_decay is None else jnp.swapaxes(log_decay, 1, 2)
    if log_decay is None:
        write, log_decay, _ = running_weights(write, None, jnp.full(write[:, 0].shape, NOTHING))
    q = q * (meta["config"].get("scale") or q.shape[-1] ** -0.5)
    outputs: dict[str, Any] = {}
    for suffix in ("", "_h0"):
        start = (
            Slots(*(jnp.asarray(inputs[f"in.h{name}0"]) for name in "kv")) if suffix and "in.hk0" in inputs else None
        )
        if suffix and start is None:
            continue
        out, slots = slot_attention(q, k, v, write, log_decay, slots=start)
        out = jnp.swapaxes(out, 1, 2) if heads_first else out
        outputs |= {f"out.o{suffix}": out, f"out.hk{suffix}": slots.keys, f"out.hv{suffix}": slots.values}
    return outputs | {"out.o_cumsum": outputs["out.o"]}
