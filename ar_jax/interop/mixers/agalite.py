"""Official runs of AGaLiTe (Flax): its attention, and the network of an agent that is made of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, params_of, tokens_of
from ar_jax.interop.rules import Rule, same, stacked
from ar_jax.mixers import MIXERS
from ar_jax.mixers.agalite import Waves
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack

# What is packed in one matrix, inside each head.
PACKED = {
    "linear_kqvbetagammas": ("key", "query", "value", "value_gate", "key_gate"),
    "linear_p1p2p3": ("key_spread", "query_spread", "gate_spread"),
}
GATES = {"Wr": "reset_new", "Ur": "reset_old", "Wz": "update_new", "Uz": "update_old", "Wg": "new", "Ug": "old"}
MEMORY = {"keys": "tilde_k", "values": "tilde_v", "total": "s", "tick": "tick"}


def _unpacked(weights: Arrays, heads: int) -> dict[str, np.ndarray]:
    """The arrays by official names, those of packed matrices by ours."""
    arrays: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        layer, _, part = name.rpartition("/")
        prefix, _, packed = layer.rpartition("/")
        if packed not in PACKED:
            arrays[name] = np.asarray(array)
            continue
        parts = array.reshape(*array.shape[:-1], heads, len(PACKED[packed]), -1)
        for i, ours in enumerate(PACKED[packed]):
            place = f"{prefix}/{ours}/{part}".removeprefix("/")
            arrays[place] = parts[..., i, :].reshape(*array.shape[:-1], -1)
    return arrays


def _attention_rules(there: str, here: str) -> list[Rule]:
    names = {ours: ours for packed in PACKED.values() for ours in packed} | {"project": "out"}
    return [same(f"{there}{a}/{part}", f"{here}{b}/{part}") for a, b in names.items() for part in ("kernel", "bias")]


def _fields(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    return dict(
        embed_dim=width, num_heads=config["n_heads"], head_dim=config["d_head"], expansion=config["eta"],
        num_waves=config["r"], epsilon=config.get("eps", 1e-5), one_clock=True,
    )  # fmt: skip


def _memory(inputs: Arrays, prefix: str) -> Waves:
    """The given memory of one layer, for a batch of one."""
    found = {ours: jnp.asarray(inputs[f"{prefix}.{there}"]) for ours, there in MEMORY.items()}
    tick = found.pop("tick").reshape(1).astype(jnp.int32)
    return Waves(**{name: a[None] for name, a in found.items()}, tick=tick)


def _of_memory(memory: Waves, prefix: str) -> Outputs:
    return {f"{prefix}.{there}": getattr(memory, ours)[0] for ours, there in MEMORY.items() if ours != "tick"} | {
        f"{prefix}.tick": memory.tick
    }


def _emptied(memory: Any, ended: Array) -> Any:
    """The memories, all but the clock dropped where an episode has ended."""

    def one(memory: Waves) -> Waves:
        empty = {name: jnp.where(ended > 0, 0, getattr(memory, name)) for name in ("keys", "values", "total")}
        return dataclasses.replace(memory, **empty)

    return jax.tree.map(one, memory, is_leaf=lambda a: isinstance(a, Waves))


def replay_attention(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The layer from a given memory, which it drops where an episode ends."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])[None]
    mixer = MIXERS["agalite"](**_fields(config, weights["project/kernel"].shape[1]))
    rules, arrays = _attention_rules("", ""), _unpacked(weights, config["n_heads"])
    variables = params_of(mixer, rules, arrays, x, tokens_of(x.shape[1]))
    ended = _ended(config, inputs)
    tokens = _episodes(ended)
    before = _emptied(_memory(inputs, "in.mem.layer_1"), ended[0])
    out, memory = jax.jit(lambda v, x, before: mixer.apply(v, x, tokens, before))(variables, x, before)
    return {"out.y": out[0]} | _of_memory(memory, "out.new_mem")


def _ended(config: Mapping[str, Any], inputs: Arrays) -> Array:
    """Where an episode has ended in front of a step, [T]; nowhere for networks that do not drop their memory then."""
    ended = jnp.asarray(inputs["in.terminations"])
    resets = config.get("reset_on_terminate", config.get("reset_hidden_on_terminate", True))
    return ended if resets else jnp.zeros_like(ended)


def _episodes(ended: Array) -> Tokens:
    """Steps one after the other, of which some begin an episode, [T]."""
    return dataclasses.replace(tokens_of(len(ended)), segment=jnp.cumsum(ended, dtype=jnp.int32)[None])


def _block_rules() -> list[Rule]:
    """Of each layer but what embeds the first one's input."""
    there, here = "layer{i}/", "layers/block_0/"
    rules = _attention_rules(f"{there}AttentionORLiTLayer_0/", f"{here}mixer/")
    for n, (ours, dense) in enumerate((("mixer", "up"), ("mlp", "down"))):
        rules += [same(f"{there}LayerNorm_{n}/{part}", f"{here}{ours}_norm/{part}") for part in ("scale", "bias")]
        rules += [same(f"{there}Dense_{n}/{part}", f"{here}mlp/{dense}/{part}") for part in ("kernel", "bias")]
        gate = f"{there}GRUGatingUnit_{n}", f"{here}{ours}_gate"
        rules += [same(f"{gate[0]}/{a}/kernel", f"{gate[1]}/{b}/kernel") for a, b in GATES.items()]
        rules += [same(f"{gate[0]}/bgp", f"{gate[1]}/offset")]
    return rules


def replay_network(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """From given memories and from empty ones, with ends of episodes and without, whole and step by step."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])[None]
    length, depth, width = x.shape[1], config["n_layers"], config["d_model"]
    options = BlockOptions(
        mlp_dim=config["d_ffc"], norm="layer", residual="gru", activation="relu", gated=False, mlp_bias=True
    )
    stack = Stack((functools.partial(MIXERS["agalite"], **_fields(config, width)),), depth, options)
    embedding = [jnp.asarray(weights[f"layer1/emb_layer/{part}"]) for part in ("kernel", "bias")]
    x = nn.relu(x @ embedding[0] + embedding[1][None, None])
    inner = {name: a for name, a in _unpacked(weights, config["n_heads"]).items() if "emb_layer" not in name}
    variables = params_of(stack, stacked(range(1, depth + 1), _block_rules()), inner, x, tokens_of(length))
    given = tuple((_memory(inputs, f"in.mem.layer_{i + 1}"),) for i in range(depth))
    ended = _ended(config, inputs)

    @jax.jit
    def run(before: Any, ended: Array) -> tuple[Array, Any]:
        out, after = stack.apply(variables, x, _episodes(ended), None, _emptied(before, ended[0]))
        return out[0], after

    def step(memory: Any, now: tuple[Array, Array]) -> tuple[Any, Array]:
        token, ended = now
        out, memory = stack.apply(variables, token[None, None], tokens_of(1), None, _emptied(memory, ended))
        return memory, out[0, 0]

    y, after = run(given, ended)
    outputs = {
        "out.y": y,
        "out.y_zero_mem": run(stack.init_state(1, length, 1), ended)[0],
        "out.y_no_termination": run(given, jnp.zeros_like(ended))[0],
        "out.y_step": jax.jit(lambda memory: jax.lax.scan(step, memory, (x[0], ended))[1])(given),
    }
    for i, (memory,) in enumerate(after):
        outputs |= _of_memory(memory, f"out.new_mem.layer_{i + 1}")
    return outputs
