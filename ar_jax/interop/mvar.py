"""M-VAR (S005, arXiv:2411.10433): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.interop import var
from ar_jax.interop.generators import Outputs, Weights, mlp, official_run
from ar_jax.interop.mixers.mamba import fields_of, mamba2_rules
from ar_jax.interop.rules import Rule, linear, prefixed, sections, unused
from ar_jax.system import System

WITHIN, ACROSS = "decoder/stack/layers/block_0", "decoder/stack/layers/block_1"
# There gates, scales and shifts of attention, Mamba and MLP; here shift, scale and gate of each, of two blocks.
NINE = sections((6, 3, 0, 7, 4, 1, 8, 5, 2))


def rules(system: System) -> list[Any]:
    """The network's weights; those of its tokenizer, which is VAR's, are in a file of their own."""
    within, across = (make() for make in system.model.generator.decoder.mixers)
    block = [
        *(_modulations(there, here) for there, here in (("weight", "kernel"), ("bias", "bias"))),
        *var.attention(WITHIN, within),
        unused("blocks.{i}.attn.patch_nums"),
        prefixed("blocks.{i}.mamba.", f"{ACROSS}/mixer/", mamba2_rules(across)),
        mlp("blocks.{i}.ffn", f"{ACROSS}/mlp", ("fc1", "fc2"), linear),
    ]
    return prefixed("", "generator/", var.network(system, block))


def _modulations(official: str, ours: str) -> Rule:
    """One projection there is two here: three parts of it in the first block, six in the second."""
    return Rule(
        (f"blocks.{{i}}.ada_lin.1.{official}",),
        tuple(f"{layer}/modulation/project/{ours}" for layer in (WITHIN, ACROSS)),
        lambda arrays, shapes: np.split(NINE.read(arrays[0]), [shapes[0][-1]], axis=-1),
        lambda leaves, kept: [NINE.write(np.concatenate(leaves, axis=-1))],
    )


def model_config(
    dim: int, depth: int, num_heads: int, l2_norm: bool = True, mlp_ratio: float = 4.0, **mamba: Any
) -> dict[str, Any]:
    """`config.model` of M-VAR: VAR's, with attention within a scale, and Mamba-2 across scales before each MLP.

    Args:
      dim: width.
      depth: blocks of attention, Mamba and MLP.
      num_heads: of attention.
      l2_norm: see `var.model_config`.
      mlp_ratio: width of the MLPs over dim.
      **mamba: further options of the mixer `mamba2`.
    """
    model = var.model_config(dim, 2 * depth, num_heads, l2_norm=l2_norm, mlp_ratio=mlp_ratio)
    attention = {k: v for k, v in model["mixer"].items() if k != "kind"} | dict(window=1)
    mixer = dict(kind="softmax : mamba2", softmax=attention, mamba2=dict(state_dim=64, head_dim=64) | mamba)
    return model | dict(mlps="last", mixer=mixer)


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Teacher-forced with and without the class; greedy generation with and without guidance, and its images."""
    given = meta["config"]
    sizes = (given["embed_dim"], given["depth"], given["num_heads"], given["attn_l2_norm"], given.get("mlp_ratio", 4.0))
    model = model_config(*sizes, **fields_of(given.get("mamba", {})))
    config = var.around(meta, model | {"norm_epsilon": given.get("norm_eps", 1e-6)})

    def both(system: System) -> list[Any]:
        return var.with_tokenizer(system, prefixed("mvar.", "", rules(system)))

    system, params = official_run(config, given["num_classes"], both, weights)
    return var.replayed(system, params, inputs, given["cfg_scale"])
