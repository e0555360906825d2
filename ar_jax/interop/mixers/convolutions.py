"""Official runs of convolutions along time: lightweight and dynamic ones (fairseq)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, one_by_one, params_of, swapped, tokens_of, whole
from ar_jax.interop.rules import Layout, Rule, same
from ar_jax.mixers import MIXERS

# [heads, 1, width], the latest token's tap last <-> [width, heads], the latest token's first
FILTERS = Layout(lambda w: w[:, 0, ::-1].T, lambda w: w.T[:, None, ::-1])


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    width, before = config["K"], config["padding_l"]
    fields = {"embed_dim": config["C"], "num_heads": config["H"], "width": width, "gated": False}
    causal = before == width - 1
    return fields | {"causal": causal, "ahead": None if causal else width - 1 - before}


def replay_lightweight(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The convolution of the class for [T, B, C], whole and token by token, and of the one that interleaves its heads."""
    config, x = meta["config"], swapped(inputs["in.x"])
    fields = _fields(config) | {"softmax": config["weight_softmax"], "bias": config["bias"]}
    rules = [same("weight", "filters", layout=FILTERS), *([same("bias", "offset")] if config["bias"] else [])]
    mixer = MIXERS["lightweight_convolution"](**fields)
    variables = params_of(mixer, rules, weights, x, tokens_of(x.shape[1]))
    interleaved = MIXERS["lightweight_convolution"](
        **fields | {"causal": False, "ahead": None, "interleaved_heads": True}
    )
    found = {"out.y": mixer, "out.y_bct_class": interleaved}
    outputs = {name: swapped(whole(m, variables, x)) for name, m in found.items() if name in meta["outputs"]}
    if mixer.causal:
        outputs["out.y_step"] = swapped(one_by_one(mixer, variables, x))
    return outputs


def _taps(official: str, ours: str, config: Mapping[str, Any], layer: str | None) -> Rule:
    """The projection to each head's taps, with the one to the values in front where `layer` names it."""
    heads, width, lead = config["H"], config["K"], config["C"] if layer else 0

    def read(arrays: Any, shapes: Any) -> list[np.ndarray]:
        own, taps = arrays[0][:lead], arrays[0][lead:]
        latest_first = taps.reshape(heads, width, -1)[:, ::-1].swapaxes(0, 1).reshape(taps.shape)
        return [latest_first.T, *([own.T] if layer else [])]

    def write(leaves: Any, kept: Any) -> list[np.ndarray]:
        taps = leaves[0].T
        taps = taps.reshape(width, heads, -1)[::-1].swapaxes(0, 1).reshape(taps.shape)
        return [np.concatenate([leaves[1].T, taps]) if layer else taps]

    return Rule((official,), (f"logits/{ours}", *([f"{layer}/{ours}"] if layer else [])), read, write)


def replay_dynamic(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The convolution by filters that come from x or from a query, whole and token by token."""
    config, x = meta["config"], swapped(inputs["in.x"])
    source = swapped(inputs["in.query"]) if "in.query" in inputs else x
    softmax = config.get("weight_softmax", True)  # without it, the official code does not renormalise
    told = {"dynamic": True, "in_proj": config["in_proj"], "softmax": softmax}
    told |= {"renormalize": softmax and config["renorm_padding"]}
    fields = _fields(config) | told | {"filter_bias": config["bias"], "bias": config["conv_bias"]}
    mixer = MIXERS["lightweight_convolution"](**fields)
    layer = "inner" if config["in_proj"] else None
    rules = [_taps("weight_linear.weight", "kernel", config, layer)]
    rules += [_taps("weight_linear.bias", "bias", config, layer)] if "weight_linear.bias" in weights else []
    rules += [same("conv_bias", "offset")] if config["conv_bias"] else []
    variables = params_of(mixer, rules, weights, x, source, tokens_of(x.shape[1]), method="convolve")
    outputs = {"out.y": swapped(whole(mixer, variables, x, jnp.asarray(source), method="convolve"))}
    if mixer.causal:
        outputs["out.y_step"] = swapped(one_by_one(mixer, variables, x, source, method="convolve"))
    return outputs
