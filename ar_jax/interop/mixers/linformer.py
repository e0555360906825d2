"""Official runs of Linformer: its attention, and a language model that reads both ways."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.interop.generators import mlp
from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, params_of, tokens_of, whole
from ar_jax.interop.rules import linear, norm, same, stacked
from ar_jax.mixers import MIXERS
from ar_jax.models.blocks import Block, BlockOptions
from ar_jax.models.decoder import Stack

plain = functools.partial(linear, bias=False)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        embed_dim=config["dim"], num_rows=config["seq_len"], num_heads=config["heads"], rank=config["k"],
        num_kv_heads=1 if config["one_kv_head"] else None, head_dim=config.get("dim_head"),
        share_values=config["share_kv"],
    )  # fmt: skip


def _rules(there: str, here: str, share_values: bool) -> list[Any]:
    names = [("k", "key"), *([] if share_values else [("v", "value")])]
    rows = [same(f"{there}proj_{short}", f"{here}{name}_projection") for short, name in names]
    layers = [plain(f"{there}to_{short}", f"{here}{name}") for short, name in (("q", "query"), *names)]
    return [rows, layers, linear(f"{there}to_out", f"{here}out")]


def _with_rank(weights: Arrays) -> Arrays:
    """Their projections along time [places, rank] as ours [places, 1, rank]."""
    return {name: w[:, None] if "proj_" in name.rsplit(".", 1)[-1] else w for name, w in weights.items()}


def replay_attention(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """A whole sequence, a shorter one, and one that reads another."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])
    mixer = MIXERS["linformer"](**_fields(config))
    rules = _rules("", "", config["share_kv"])
    variables = params_of(mixer, rules, _with_rank(weights), x, tokens_of(x.shape[1]))
    context = jnp.asarray(inputs["in.ctx"])
    read = jax.jit(lambda v, x, c: mixer.apply(v, x, c, tokens_of(c.shape[1]), method="read"))
    return {
        "out.y": whole(mixer, variables, x),
        "out.y_short": whole(mixer, variables, x[:, : config["short"]]),
        "out.y_context": read(variables, x, context),
    }


def replay_lm(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Logits of tokens that read one another both ways."""
    config, tokens = meta["config"], inputs["in.tokens"]
    reversible, depth, layer = config["reversible"], config["depth"], "layers/block_0"
    make = functools.partial(MIXERS["linformer"], **_fields(config))
    options = BlockOptions(
        mlp_dim=4 * config["dim"], norm="layer", norm_epsilon=1e-5, activation="gelu_exact", gated=False, mlp_bias=True
    )
    net = "linformer.net."
    mix, feed = (f"{net}blocks.{{i}}.{f}.net." if reversible else f"{net}layers.{{i}}.{n}." for n, f in enumerate("fg"))
    block = [
        norm(f"{mix}norm", f"{layer}/mixer_norm"),
        _rules(f"{mix}fn.", f"{layer}/mixer/", config["share_kv"]),
        norm(f"{feed}norm", f"{layer}/mlp_norm"),
        mlp(f"{feed}fn", f"{layer}/mlp", ("w1", "w2"), linear),
    ]
    ends = {name: w for name, w in weights.items() if not name.startswith(net)}
    inner = _with_rank({name: w for name, w in weights.items() if name.startswith(net)})
    x = jnp.asarray(ends["token_emb.weight"][tokens] + ends["pos_emb.weight"][None, : tokens.shape[1]])
    stack = Stack((make,), depth, options)
    variables = params_of(stack, stacked(depth, block), inner, x, tokens_of(x.shape[1]))
    if reversible:
        x = _reversible(Block(make, options), variables["params"]["layers"]["block_0"], depth, x)
    else:
        x = whole(stack, variables, x)
    return {"out.logits": x @ ends["to_logits.weight"].T + ends["to_logits.bias"][None, None]}


def _reversible(block: Block, params: Any, depth: int, x: Array) -> Array:
    """y_1 = x_1 + f(x_2), y_2 = x_2 + g(y_1) from two copies of x, summed at the end (arXiv:1707.04585)."""
    tokens = tokens_of(x.shape[1])

    def layer(pair: tuple[Array, Array], params: Any) -> tuple[tuple[Array, Array], None]:
        bound = block.bind({"params": params})
        first = pair[0] + bound.mixer(bound.mixer_norm(pair[1]), tokens)[0]
        return (first, pair[1] + bound.mlp(bound.mlp_norm(first))), None

    run = jax.jit(lambda params, x: jax.lax.scan(layer, (x, x), params, depth)[0])
    return sum(run(params, x))
