"""Official runs of linear attention: layers of linear transformers, and operations on queries, keys and values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import choose
from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, one_by_one, params_of, swapped, tokens_of, whole
from ar_jax.interop.rules import linear, norm, stacked
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.mixers import MIXERS
from ar_jax.mixers.common.feature_maps import FEATURE_MAPS
from ar_jax.mixers.hgrn import gated_sum
from ar_jax.mixers.linear import fixed_log_decay
from ar_jax.mixers.norms import make_norm
from ar_jax.mixers.protocol import NEVER, Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack

PROJECTIONS = {f"{name}_projection": name for name in ("query", "key", "value", "out")}
EPSILON = 1e-6  # what is added to the sum of weights, where the official class has no argument for it
ACTIVATIONS = {"relu": "relu", "gelu": "gelu_exact"}
ATTENTIONS = {"causal-linear": True, "linear": False}


def _fields(config: Mapping[str, Any], weights: Arrays, prefix: str = "") -> dict[str, Any]:
    """The mixer's fields but embed_dim: elu + 1, queries not scaled, biases everywhere."""
    heads = config["n_heads"]
    wide, deep = (weights[f"{prefix}{name}_projection.weight"].shape[0] // heads for name in ("query", "value"))
    return dict(
        num_heads=heads, head_dim=wide, value_dim=deep, feature_map=config.get("feature_map") or "elu", query_scale=1.0,
        epsilon=config.get("eps", EPSILON), qkv_bias=True, out_bias=True,
    )  # fmt: skip


def replay_layer(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The layer causally, whole and token by token, and both ways, with padding behind each sequence and without."""
    fields, x = _fields(meta["config"], weights), jnp.asarray(inputs["in.x"])
    (batch, length, width), tokens = x.shape, tokens_of(x.shape[1])
    causal, both_ways = (MIXERS["linear"](embed_dim=width, causal=way, **fields) for way in (True, False))
    rules = [linear(there, here) for there, here in PROJECTIONS.items()]
    variables = params_of(causal, rules, weights, x, tokens)
    y, state = jax.jit(causal.apply)(variables, x, tokens, causal.init_state(batch, length, 1))
    outputs = {
        "out.y_causal": y,
        "out.y_recurrent": one_by_one(causal, variables, x),
        "out.y_noncausal": whole(both_ways, variables, x),
        "out.S": state.memory[..., :-1],
        "out.Z": state.memory[..., -1],
    }
    if "in.lengths" in inputs:
        there = tokens.step < jnp.asarray(inputs["in.lengths"], jnp.int32)[:, None]
        padded = dataclasses.replace(tokens, step=jnp.where(there, tokens.step, NEVER), padded=True)
        outputs["out.y_noncausal_lengths"] = jax.jit(both_ways.apply)(variables, x, padded)[0]
    return outputs


def replay_encoder(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Post-norm blocks and the norm behind them, on whole sequences and, where they are causal, token by token."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])
    (batch, length, width), depth = x.shape, config["n_layers"]
    causal = choose(ATTENTIONS, config.get("attention_type", "causal-linear"), "attention_type")
    mixer = functools.partial(
        MIXERS["linear"], embed_dim=width, causal=causal, **_fields(config, weights, "layers.0.attention.")
    )
    options = BlockOptions(
        mlp_dim=weights["layers.0.linear1.weight"].shape[0], norm="layer", norm_epsilon=1e-5, norm_first=False,
        activation=choose(ACTIVATIONS, config.get("activation", "relu"), "activation"), gated=False, mlp_bias=True,
    )  # fmt: skip
    stack = Stack((mixer,), depth, options)
    there, here = "layers.{i}.", "layers/block_0/"
    block = [linear(f"{there}attention.{name}", f"{here}mixer/{ours}") for name, ours in PROJECTIONS.items()]
    block += [linear(f"{there}linear{n}", f"{here}mlp/{ours}") for n, ours in ((1, "up"), (2, "down"))]
    block += [norm(f"{there}norm{n}", f"{here}{ours}_norm") for n, ours in ((1, "mixer"), (2, "mlp"))]
    inner = {name: w for name, w in weights.items() if not name.startswith("norm.")}
    variables = params_of(stack, stacked(depth, block), inner, x, tokens_of(length))
    last = {"scale": weights["norm.weight"], "bias": weights["norm.bias"]} if "norm.weight" in weights else None

    def normed(y: Any) -> Array:
        module = make_norm("layer", 1e-5, jnp.float32, jnp.float32)()
        return y if last is None else module.apply({"params": last}, y)

    outputs = {"out.y": normed(jax.jit(lambda v, x: stack.apply(v, x, tokens_of(length))[0])(variables, x))}
    if causal:
        states = stack.init_state(batch, length, 1)

        def step(states: Any, fed: tuple[Array, Array]) -> tuple[Any, Array]:
            index, now = fed
            tokens = Tokens(index[None, None], index[None, None, None], 1)
            out, states = stack.apply(variables, now[:, None], tokens, None, states)
            return states, out[:, 0]

        index = jnp.arange(length, dtype=jnp.int32)
        outputs["out.y_recurrent"] = normed(
            swapped(jax.jit(lambda fed: jax.lax.scan(step, states, fed)[1])((index, swapped(x))))
        )
    return outputs


def _heads(inputs: Arrays, config: Mapping[str, Any], heads_first: bool) -> tuple[Array, Array, Array]:
    """Scaled queries, keys and values, [B, T, N, H]."""
    q, k, v = (jnp.asarray(inputs[f"in.{name}"]) for name in "qkv")
    if heads_first:
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    scale = config.get("scale") or q.shape[-1] ** -0.5
    return q * scale, k, v


def _from_both_starts(inputs: Arrays, read: Callable[[Any], tuple[Any, Any]]) -> Outputs:
    """What `read` gives, and the memory after it, from nothing and, where there is one, from the given memory."""
    outputs: Outputs = {}
    for suffix, start in (("", None), ("_h0", inputs.get("in.h0"))):
        if not suffix or start is not None:
            out, state = read(None if start is None else jnp.asarray(start))
            outputs |= {f"out.o{suffix}": out, f"out.ht{suffix}": state}
    return outputs


def replay_linear(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Without a decay: as it is, and of elu + 1 divided by the weights' sum; token by token and in chunks."""
    q, k, v = _heads(inputs, meta["config"], False)
    scale = meta["config"].get("scale") or q.shape[-1] ** -0.5
    mapped = [FEATURE_MAPS["elu"](jnp.asarray(inputs[f"in.{name}"])) for name in "qk"]

    def normed(**options: Any) -> tuple[Array, Array]:
        return linear_attention(mapped[0] * scale, mapped[1], v, normalize=True, epsilon=1e-10, **options)

    one_by_one: dict[str, Any] = {"implementation": "reference"}
    chunks: dict[str, Any] = {"chunk_size": meta["config"].get("chunk_size", 64)}
    out, state = normed(**one_by_one)
    return _from_both_starts(inputs, lambda start: linear_attention(q, k, v, initial_state=start, **one_by_one)) | {
        "out.o_elu_norm": out,
        "out.ht_elu_norm": state[..., :-1],
        "out.z_elu_norm": state[..., -1][:, None],
        "out.o_chunk": linear_attention(q, k, v, **chunks)[0],
        "out.o_chunk_elu_norm": normed(**chunks)[0],
    }


def replay_gated(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """With a decay for each token and head, or for each channel of its keys, too."""
    q, k, v = _heads(inputs, meta["config"], False)
    log_decay = jnp.asarray(inputs["in.gk" if "in.gk" in inputs else "in.g"])
    read = functools.partial(linear_attention, q, k, v, log_decay=log_decay)
    outputs = _from_both_starts(inputs, lambda start: read(initial_state=start, implementation="reference"))
    chunks = read()[0]
    return outputs | {name: chunks for name in ("out.o_parallel", "out.o_chunk") if name in meta["outputs"]}


def replay_lightning(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """With decays that slope over the heads, the less the deeper the layer."""
    config = meta["config"]
    q, k, v = _heads(inputs, config, False)
    log_decay = jnp.asarray(fixed_log_decay("slopes", q.shape[2], config["layer_idx"] / config["num_layers"]))
    read = functools.partial(linear_attention, q, k, v, log_decay=log_decay)
    return _from_both_starts(inputs, lambda start: read(initial_state=start)) | {"out.g_gamma": log_decay}


def replay_retention(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """With each head's own decay."""
    q, k, v = _heads(inputs, meta["config"], True)
    out, _ = linear_attention(q, k, v, log_decay=jnp.asarray(fixed_log_decay("fixed", q.shape[2])))
    return {"out.o": jnp.swapaxes(out, 1, 2)}


def replay_based(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The second-order Taylor features and the square ones, divided by the weights' sum and not."""
    q, k, v = _heads(inputs, meta["config"], True)

    def read(name: str, normalize: bool, **options: Any) -> Array:
        phi = FEATURE_MAPS[name]
        out, _ = linear_attention(phi(q), phi(k), v, normalize=normalize, epsilon=EPSILON, **options)
        return jnp.swapaxes(out, 1, 2)

    return {
        "out.o": read("taylor", True),
        "out.o_chunk": read("taylor", True, chunk_size=16),
        "out.o_nonorm": read("taylor", False),
        "out.o_rebased": read("square", True),
        "out.o_rebased_nonorm": read("square", False),
    }


def replay_hgrn(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The recurrence of single numbers."""
    values, log_decay = (jnp.asarray(np.float32(inputs[f"in.{name}"])) for name in "xg")
    return _from_both_starts(inputs, lambda start: gated_sum(values, log_decay, start))
