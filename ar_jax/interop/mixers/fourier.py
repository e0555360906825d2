"""Official runs of Fourier mixing: FNet's encoder."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from ar_jax.interop.generators import mlp
from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, params_of, tokens_of, whole
from ar_jax.interop.rules import linear, norm, stacked
from ar_jax.mixers import MIXERS
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack


def replay_fnet(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The mixing alone, and the encoder's layers."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])
    width = config["d_model"]
    make = functools.partial(MIXERS["fnet"], embed_dim=width, causal=False)
    options = BlockOptions(
        mlp_dim=width * config["expansion_factor"], norm="layer", norm_epsilon=1e-5, norm_first=False,
        activation="gelu_exact", gated=False, mlp_bias=True,
    )  # fmt: skip
    encoder, layer = Stack((make,), config["num_layers"], options), "layers/block_0"
    rules = stacked(
        config["num_layers"],
        [
            norm("{i}.norm1", f"{layer}/mixer_norm"),
            norm("{i}.norm2", f"{layer}/mlp_norm"),
            mlp("{i}.ff", f"{layer}/mlp", ("fc1", "fc2"), linear),
        ],
    )
    variables = params_of(encoder, rules, weights, x, tokens_of(x.shape[1]))
    return {"out.mix": whole(make(), {}, x), "out.y": whole(encoder, variables, x)}
