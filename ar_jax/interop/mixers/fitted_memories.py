"""Official runs of memories that are fitted while they are read, or kept in levels: operations on arrays without weights."""

from __future__ import annotations

import jax.numpy as jnp

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs
from ar_jax.kernels.log_linear import log_linear_attention
from ar_jax.kernels.mesa import MesaMemory, mesa_attention
from ar_jax.kernels.ttt import Inner, ttt_linear


def replay_mesa(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The exact solution, from nothing and from the matrices that are given, and conjugate gradients in chunks and by tokens."""
    q, k, v, g, beta, ridge = (jnp.asarray(inputs[f"in.{name}"]) for name in ("q", "k", "v", "g", "beta", "lamb"))
    turns = meta["config"].get("max_CG_iteration", 30)
    out, memory = mesa_attention(q, k, v, beta, ridge, log_decay=g, num_iterations=None)
    iterate = {"log_decay": g, "num_iterations": turns}
    outputs = {
        "out.o_exact": out,
        "out.hkk": memory.keys,
        "out.hkv": memory.values,
        "out.o_cg": mesa_attention(q, k, v, beta, ridge, start="zero", implementation="xla", **iterate)[0],
        "out.o_step": mesa_attention(q, k, v, beta, ridge, start="diagonal", implementation="reference", **iterate)[0],
    }
    if "in.hkk0" in inputs:
        start = MesaMemory(jnp.asarray(inputs["in.hkk0"]), jnp.asarray(inputs["in.hkv0"]))
        out, memory = mesa_attention(q, k, v, beta, ridge, log_decay=g, initial_state=start, num_iterations=None)
        outputs |= {"out.o_exact_h0": out, "out.hkk_h0": memory.keys, "out.hkv_h0": memory.values}
    return outputs


def replay_ttt(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """TTT-linear's inner loop. The official code fills the last mini-batch up with zeros, and learns a bias from them, too."""
    config = meta["config"]
    size = config.get("mini_batch_size", 16)
    q, k, v = (jnp.asarray(inputs[f"in.{name}"]) for name in "qkv")
    eta = jnp.broadcast_to(jnp.asarray(inputs.get("in.eta", config.get("eta"))), (*q.shape[:3], 1))
    length, scale, dim = q.shape[1], config.get("scale"), q.shape[-1]
    filled = ((0, 0), (0, -length % size), (0, 0))
    rate = jnp.pad(eta[..., 0], filled).at[:, -1].set(eta[:, -1, :, 0])
    q, k, v = (jnp.pad(x, (*filled, (0, 0))) for x in (q * (dim**-0.5 if scale is None else scale), k, v))
    begin = (q.shape[0], q.shape[2], dim)
    weight = jnp.asarray(inputs["in.h0"]) if "in.h0" in inputs else jnp.zeros((*begin, dim))
    bias = jnp.asarray(inputs["in.hb0"]).reshape(begin) if "in.hb0" in inputs else jnp.zeros(begin)
    scales, offsets = (jnp.asarray(inputs[f"in.{name}"]) for name in "wb")
    inner = Inner(weight, bias, scales, offsets, size, residual="read", epsilon=config.get("eps", 1e-6))
    out, learned = ttt_linear(q, k, v, rate, inner)
    return {"out.o": out[:, :length], "out.ht": weight + learned.weight, "out.hbt": bias + learned.bias}


def replay_log_linear(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Log-linear attention; its queries are not scaled."""
    q, k, v, g, scales = (jnp.asarray(inputs[f"in.{name}"]) for name in ("q", "k", "v", "g", "level_scales"))
    return {"out.o": log_linear_attention(q, k, v, scales, log_decay=g)[0]}
