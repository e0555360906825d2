"""Official runs of LightNet, in flash-linear-attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.rules import Rule, join, linear, norm
from ar_jax.interop.transfer import to_ours
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import NEVER, Tokens

LINEARS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "g_proj.0": "gate_down",
    "g_proj.1": "gate_up",
    "o_proj": "out",
}


CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")


def _short_rules(mixer: Any) -> list[Rule]:
    """Three convolutions are one of their channels side by side."""
    keys = mixer.num_heads * mixer.expand_ratio
    filters = Rule(
        tuple(f"{name}.weight" for name in CONVOLUTIONS),
        ("short/filters",),
        lambda arrays, shapes: [np.concatenate(arrays)[:, 0, ::-1].T],
        lambda leaves, kept: np.split(leaves[0].T[:, None, ::-1], [keys, 2 * keys]),
    )
    widths = dict(zip(CONVOLUTIONS, (keys, keys, mixer.embed_dim), strict=True))
    offsets = join({f"{name}.bias": width for name, width in widths.items()}, "short/offset")
    return [filters, offsets] if mixer.short_bias else [filters]


def replay(meta: Meta, weights: Arrays, inputs: Arrays) -> dict[str, Any]:
    """The layer on a whole sequence, piece by piece, and with padding."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])
    width, heads, ratio = config["hidden_size"], config.get("num_heads"), config.get("expand_ratio")
    mixer = MIXERS["lightnet"](
        embed_dim=width,
        num_heads=heads or width // ratio,
        expand_ratio=ratio or width // heads,
        gate_dim=config.get("gate_low_rank_dim", 128),
        short_width=config.get("conv_size", 4) if config.get("use_short_conv") else 0,
        short_bias=config.get("conv_bias", False),
        norm_scale=config.get("elementwise_affine", True),
    )
    batch, length, _ = x.shape
    index = jnp.arange(length, dtype=jnp.int32)[None]
    tokens = Tokens(index, index[..., None], length)
    rules = [
        [linear(there, here, bias=False) for there, here in LINEARS.items()],
        norm("g_norm", "norm", bias=False) if mixer.norm_scale else [],
        _short_rules(mixer) if mixer.short_width else [],
    ]
    like = jax.eval_shape(lambda: mixer.init(jax.random.key(0), x, tokens))["params"]
    params = {"params": jax.tree.map(jnp.asarray, to_ours(rules, weights, like).params)}
    apply = jax.jit(mixer.apply)
    y, memory = apply(params, x, tokens, mixer.init_state(batch, length, 1))
    pieces, state = [], mixer.init_state(batch, length, 1)
    cuts = [0, *range(config["prefill"], length + 1)]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        piece = slice(start, stop)
        out, state = apply(params, x[:, piece], tokens.part(piece), state)
        pieces.append(out)
    kept = jnp.asarray(inputs["in.mask"]) > 0
    padded, _ = apply(params, x, dataclasses.replace(tokens, step=jnp.where(kept, index, NEVER), padded=True))
    return {
        "out.y": y,
        "out.y_step": jnp.concatenate(pieces, axis=1),
        "out.y_left_padded": jnp.where(kept[..., None], padded, 0),  # what padding reads is of no account
        "out.state": memory.memory.values,
        "out.z": memory.memory.log_total[:, None],
    }
