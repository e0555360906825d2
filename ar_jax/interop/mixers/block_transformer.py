"""Official runs of Block Transformer: contexts of blocks, logits of their tokens, and blocks that are generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.interop.generators import cross_entropy
from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.rotary import pairs_of_halves
from ar_jax.interop.mixers.sequences import Outputs, params_of, tokens_of
from ar_jax.interop.rules import linear, norm, prefixed, same, stacked
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.block_transformer import BlockTransformer
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import mixer_pattern

END = 0  # one token is start, end and padding
KINDS = ("block", "token")
ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}


def _turned_channels(config: Mapping[str, Any], kind: str) -> int:
    """How many channels of a head turn."""
    return int(config[f"{kind}_dim"] // config[f"{kind}_heads"] * config.get("rotary_pct", 0.25))


def _model(config: Mapping[str, Any], num_prefix: int, num_rows: int) -> BlockTransformer:
    """GPT-NeoX's blocks in both decoders."""
    options = BlockOptions(
        mlp_dim=config["block_ff"],
        norm="layer",
        norm_epsilon=config.get("layer_norm_eps", 1e-5),
        side_by_side=config.get("use_parallel_residual", True),
        activation=ACTIVATIONS.get(config.get("hidden_act", "gelu"), config.get("hidden_act", "gelu")),
        gated=False,
        mlp_bias=True,
    )

    def mixers(kind: str) -> Any:
        channels, bias = _turned_channels(config, kind), config.get("attention_bias", True)
        turned = {"rope_base": float(config.get("rotary_emb_base", 10000)), "rope_channels": channels}
        mixer = {"kind": "softmax", "num_heads": config[f"{kind}_heads"], "qkv_bias": bias, "out_bias": bias}
        return mixer_pattern(mixer | (turned if channels else {"rope_base": 0.0}), embed_dim=config[f"{kind}_dim"])

    return BlockTransformer(
        embed_dim=config["block_dim"],
        mixers=mixers("block"),
        options=options,
        num_rows=num_rows,
        num_prefix=num_prefix,
        decoder_mixers=mixers("token"),
        num_layers=config["block_layers"],
        decoder_dim=config["token_dim"],
        decoder_layers=config["token_layers"],
        decoder_mlp_dim=config["token_ff"],
        block_length=config["block_length"],
        strategy=config["strategy"],
        expansion=config.get("expansion_ratio") or config["block_length"],
    )


def _official(config: Mapping[str, Any], weights: Arrays) -> dict[str, np.ndarray]:
    """The weights, packed projections cut into sorted queries, keys and values, and rows of tables that stand alone."""
    found = {name: w for name, w in weights.items() if not name.endswith(("attention.bias", "masked_bias", "inv_freq"))}
    found.pop("block_decoder.gpt_neox.embed_in.weight", None)
    found.pop("token_decoder.embed_out.weight")
    for kind in KINDS:
        heads, channels = config[f"{kind}_heads"], _turned_channels(config, kind)
        packed = [name for name in found if name.startswith(f"{kind}_decoder.") and "query_key_value" in name]
        for name in packed:
            array = found.pop(name)
            split = array.reshape(heads, 3, -1, *array.shape[1:])
            for i, part in enumerate(("query", "key", "value")):
                rows = split[:, i].reshape(-1, *array.shape[1:])
                rows = rows if part == "value" else pairs_of_halves(rows, heads, channels)
                found[name.replace("query_key_value", part)] = rows
    found["empty"] = weights["embedder.embeddings.weight"][END]
    if config["strategy"] != "prefix":
        found["start"] = weights["token_decoder.gpt_neox.embed_in.weight"][END]
    expand = "token_decoder.expansion_layer.weight"
    found[expand] = found[expand][..., 0]
    return found


def _rules(config: Mapping[str, Any]) -> list[Any]:
    parts = ("query", "key", "value")
    bias = config.get("attention_bias", True)
    layer = [
        [linear(f"attention.{part}", f"mixer/{part}", bias) for part in parts],
        linear("attention.dense", "mixer/out", bias),
        norm("input_layernorm", "mixer_norm"),
        norm("post_attention_layernorm", "mlp_norm"),
        linear("mlp.dense_h_to_4h", "mlp/up"),
        linear("mlp.dense_4h_to_h", "mlp/down"),
    ]

    def decoder(kind: str, ours: str) -> list[Any]:
        layers = stacked(config[f"{kind}_layers"], prefixed("layers.{i}.", "stack/layers/block_0/", layer))
        return prefixed(f"{kind}_decoder.gpt_neox.", ours, [layers, norm("final_layer_norm", "norm")])

    return [
        same("embedder.embeddings.weight", "embed/kernel"),
        same("token_decoder.gpt_neox.embed_in.weight", "token_embed/kernel"),
        linear("token_decoder.expansion_layer", "expand"),
        decoder("block", "blocks/"),
        decoder("token", "tokens/"),
        same("empty", "empty"),
        [same("start", "start")] if config["strategy"] != "prefix" else [],
    ]


def replay(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Blocks' embeddings and contexts, logits and loss of all but the first block, and two greedy continuations."""
    config, blocks = meta["config"], jnp.asarray(inputs["in.input_ids"], jnp.int32)
    batch, count, length = blocks.shape
    vocab = len(weights["embedder.embeddings.weight"])
    values = blocks.reshape(batch, -1)
    fed = jax.nn.one_hot(values, vocab)  # so that an embedding is a row of the projection
    model = _model(config, length, values.shape[1])
    variables = params_of(model, _rules(config), _official(config, weights), fed, tokens_of(values.shape[1]))
    head = jnp.asarray(weights["token_decoder.embed_out.weight"].T)

    def contexts(model: BlockTransformer, x: Array) -> tuple[Array, Array]:
        embedded = model.embed_tokens(x, jnp.ones((1, x.shape[1]), bool)).reshape(batch, count, -1)
        context, _ = model.read_blocks(embedded, jnp.arange(count)[None], jnp.ones((1, count), bool), False, None, True)
        return embedded, context

    embedded, context = jax.jit(lambda v, x: model.apply(v, x, method=contexts))(variables, fed)
    whole = jax.jit(lambda v, x: model.apply(v, x, tokens_of(x.shape[1]))[0] @ head)(variables, fed)
    logits = whole[:, length - 1 : -1]
    prompt = values[:, : config["prompt_blocks"] * length]
    greedy = [_generated(model, variables, head, a, config["gen"]) for a in (prompt, prompt[:, 1:])]
    return {
        "out.block_embeddings": embedded,
        "out.block_context": context,
        "out.logits": logits,
        "out.loss": cross_entropy(logits, values[:, length:]).mean(),
        "out.greedy": greedy[0],
        "out.greedy_ragged_prompt": greedy[1],
    }


def _generated(model: BlockTransformer, variables: Any, head: Array, prompt: Array, count: int) -> np.ndarray:
    """A prompt [B, P] and what follows: at most `count` tokens, and blocks until all examples have ended."""
    batch, given = prompt.shape
    model = dataclasses.replace(model, num_prefix=given, num_rows=given + count)

    @jax.jit
    def continued(variables: Any, prompt: Array) -> Array:
        def read(values: Array, first: Array | int, state: Any) -> tuple[Array, Any]:
            step = (first + jnp.arange(values.shape[1], dtype=jnp.int32))[None]
            tokens = Tokens(step, step[..., None], values.shape[1])
            hidden, state = model.apply(variables, jax.nn.one_hot(values, head.shape[1]), tokens, None, state)
            return (hidden[:, -1] @ head).argmax(axis=-1), state

        def step(carry: Any, index: Array) -> tuple[Any, Array]:
            (token, ended), state = carry
            token = jnp.where(ended, END, token)
            following, state = read(token[:, None], index, state)
            return ((following, ended | (token == END)), state), token

        first, state = read(prompt, 0, model.init_state(batch, given + count, given))
        carry = (first, jnp.zeros(batch, bool)), state
        return jax.lax.scan(step, carry, given + jnp.arange(count))[1]

    following = np.asarray(continued(variables, prompt)).T
    empty, length = model.num_empty, model.block_length
    for stop in range(length, count + length, length):
        # The official loop counts the empty places of the first block as tokens.
        if (following[:, :stop] == END).any(axis=1).all() or empty + given + stop >= given + count:
            break
    return np.concatenate([np.asarray(prompt), following[:, :stop]], axis=1)
