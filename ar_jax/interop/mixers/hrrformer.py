"""Official runs of Hrrformer (Flax): its attention, and a classifier of texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, params_of, tokens_of, whole
from ar_jax.interop.rules import Rule, same, stacked
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import NEVER, Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack

PROJECTIONS = {"query": "query", "key": "key", "value": "value", "output": "out"}


def _rules(there: str, here: str) -> list[Rule]:
    return [same(f"{there}{name}/kernel", f"{here}{ours}/kernel") for name, ours in PROJECTIONS.items()]


def _padded(present: Array) -> Tokens:
    """Tokens [B, T] of which some are padding."""
    there = tokens_of(present.shape[1])
    return dataclasses.replace(there, step=jnp.where(present, there.step, NEVER), padded=True)


def replay_attention(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """With and without padding."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])
    make = functools.partial(MIXERS["hrrformer"], embed_dim=config["features"], num_heads=config["heads"])
    variables = params_of(make(), _rules("", ""), weights, x, tokens_of(x.shape[1]))
    tokens, published = _padded(jnp.asarray(inputs["in.mask"]) > 0), make(binds_padding=True)
    masked = jax.jit(lambda v, x: published.apply(v, x, tokens)[0])(variables, x)
    return {"out.y": masked, "out.y_nomask": whole(make(), variables, x)}


def replay_classifier(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Logarithms of the classes' probabilities; token 0 is padding, but its output enters the mean."""
    config, tokens = meta["config"], jnp.asarray(inputs["in.tokens"], jnp.int32)
    width, depth, layer, there = (
        config["embed_size"],
        config["n_layer"],
        "layers/block_0",
        "Encoder_0/EncoderLayer_{i}/",
    )
    fields = dict(embed_dim=width, num_heads=config["heads"], binds_padding=True)
    options = BlockOptions(mlp_dim=2 * width, norm="layer", activation="gelu", gated=False, mlp_bias=True)
    block: list[Rule] = _rules(f"{there}SelfAttention_0/", f"{layer}/mixer/")
    for n, (mine, dense) in enumerate((("mixer_norm", "up"), ("mlp_norm", "down"))):
        block += [same(f"{there}LayerNorm_{n}/{part}", f"{layer}/{mine}/{part}") for part in ("scale", "bias")]
        block += [same(f"{there}MLP_0/Dense_{n}/{part}", f"{layer}/mlp/{dense}/{part}") for part in ("kernel", "bias")]
    stack = Stack((functools.partial(MIXERS["hrrformer"], **fields),), depth, options)
    table = weights["Encoder_0/EmbeddingFixed_0/Embed_0/embedding"]
    x = jnp.asarray(table)[tokens] + sinusoids(tokens.shape[1], width)[None]
    inner = {name: w for name, w in weights.items() if "/EncoderLayer_" in name}
    inner |= {f"Encoder_0/EncoderLayer_{i}/MLP_0/Dense_1/bias": np.zeros(width, np.float32) for i in range(depth)}
    variables = params_of(stack, stacked(depth, block), inner, x, tokens_of(x.shape[1]))
    x = jax.jit(lambda v, x: stack.apply(v, x, _padded(tokens > 0))[0])(variables, x)
    return {"out.log_probs": _classes(weights, x.mean(axis=1))}


def _classes(weights: Mapping[str, np.ndarray], x: Array) -> Array:
    """[B, D] to [B, classes], by two dense layers."""
    first, last = ((weights[f"Dense_{i}/kernel"], weights[f"Dense_{i}/bias"][None]) for i in range(2))
    return nn.log_softmax(nn.gelu(x @ first[0] + first[1]) @ last[0] + last[1])


def sinusoids(length: int, width: int) -> Array:
    """Sines in the even channels and cosines in the odd ones, [length, width] (arXiv:1706.03762, sec. 3.5)."""
    speed = 10000.0 ** (-np.arange(0, width, 2) / width)
    angle = np.arange(length)[:, None] * speed[None]
    return jnp.asarray(np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, -1)[:, :width], jnp.float32)
