"""LlamaGen (arXiv:2406.06525): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.heads.filters import filtered
from ar_jax.heads.protocol import Sampling
from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, logits_in_order, mlp, official_run
from ar_jax.interop.rules import Rule, embedding, linear, norm, packed_linear, prefixed, same, stacked
from ar_jax.system import System

plain = functools.partial(linear, bias=False)


def rules(system: System) -> list[Any]:
    """The network's weights, `gpt.*`; for class and for text conditions."""
    decoder = system.model.generator.decoder
    return prefixed(
        "",
        "generator/",
        [
            embedding("tok_embeddings", "value_embed"),
            condition(system),
            layers(decoder.num_layers, "decoder/stack"),
            norm("norm", "decoder/norm", bias=False),
            plain("output", "head/logits"),
        ],
    )


def layers(numbers: int | Iterable[int], stack: str) -> list[Rule]:
    """The official layers of these numbers, `layers.*`, that are one stack here."""
    layer = f"{stack}/layers/block_0"
    block = [
        norm("layers.{i}.attention_norm", f"{layer}/mixer_norm", bias=False),
        packed_linear(
            "layers.{i}.attention.wqkv", [f"{layer}/mixer/{n}" for n in ("query", "key", "value")], bias=False
        ),
        plain("layers.{i}.attention.wo", f"{layer}/mixer/out"),
        norm("layers.{i}.ffn_norm", f"{layer}/mlp_norm", bias=False),
        mlp("layers.{i}.feed_forward", f"{layer}/mlp", ("w3", "w2", "w1"), plain),
    ]
    return stacked(numbers, block)


def condition(system: System) -> list[Rule | list[Rule]]:
    """The embedding of classes, or the projection of captions."""
    told = system.model.generator.condition
    if hasattr(told, "num_classes"):
        return [embedding("cls_embedding.embedding_table", "condition/embed")]
    null = (told.num_tokens, told.channels)
    return [
        plain("cls_embedding.cap_proj.fc1", "condition/up"),
        plain("cls_embedding.cap_proj.fc2", "condition/project"),
        same("cls_embedding.uncond_embedding", "condition/null", shape=null),
    ]


def model_config(
    dim: int,
    num_layers: int,
    num_heads: int,
    multiple_of: int,
    epsilon: float = 1e-5,
    num_kv_heads: int | None = None,
    mlp_factor: float = 1.0,
    rope_base: float = 10000.0,
) -> dict[str, Any]:
    """`config.model` of LlamaGen's GPT: Llama's blocks, rotations on two axes, nothing learned about positions."""
    hidden = -(-int(mlp_factor * int(8 * dim / 3)) // multiple_of) * multiple_of
    mixer: dict[str, Any] = dict(kind="softmax", num_heads=num_heads, rope_base=rope_base, prefix_rotation="zero")
    if num_kv_heads is not None:
        mixer["num_kv_heads"] = num_kv_heads
    return dict(
        kind="decoder", embed_dim=dim, num_layers=num_layers, mlp_dim=hidden, norm="rms", norm_epsilon=epsilon,
        learned_positions=False, target_positions=False, mixer=mixer,
    )  # fmt: skip


def from_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenizer, condition, head and model of a config, from the official ModelArgs, which many descendants share."""
    side = round(given["block_size"] ** 0.5)
    text = given.get("model_type") == "t2i"
    drop = given.get("class_dropout_prob", 0.1)
    told = (
        dict(
            kind="embedding",
            num_tokens=given.get("cls_token_num", 1),
            channels=given.get("caption_dim", 2048),
            projection="mlp",
        )
        if text
        else dict(kind="class")
    )
    model = model_config(
        given["dim"],
        given["n_layer"],
        given["n_head"],
        given.get("multiple_of", 256),
        given.get("norm_eps", 1e-5),
        given.get("n_kv_head"),
        given.get("ffn_dim_multiplier") or 1.0,
        float(given.get("rope_base", 10000)),
    )
    return dict(
        tokenizer=dict(kind="codes", grids=((side, side),), vocab_size=given["vocab_size"]),
        condition=told | {"guidance_dropout_rate": drop},
        head=dict(kind="categorical", use_bias=False),
        model=model,
    )


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    return from_arguments(meta["config"]) | dict(order=dict(kind="raster"))


def replay_class(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Class-conditional: teacher-forced logits and loss, greedy generation with and without guidance, filters."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    system, params = official_run(_config(meta), given["num_classes"], rules, weights)
    logits, target = logits_in_order(system, params, inputs["in.tokens"], labels)
    run = functools.partial(greedy, system, params, labels, len(labels))
    scale, interval = given["cfg_scale"], given["cfg_interval"]
    options = given["filter"]
    settings = Sampling(options["temperature"], options.get("top_k") or None, options.get("top_p"))
    kept = filtered(jnp.asarray(inputs["in.filter_logits"]), settings)
    return {
        "out.logits": logits,
        "out.loss": cross_entropy(logits, target).mean(),
        "out.greedy": run(),
        "out.greedy_cfg": run(guidance_scale=scale),
        "out.greedy_cfg_interval": run(guidance_scale=scale, guidance_steps=interval + 2 if interval > -1 else None),
        "out.filtered_probs": jnp.exp(kept - jnp.log(jnp.exp(kept).sum(axis=-1, keepdims=True))),
    }


def replay_text(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Text-conditional: captions with padding in front."""
    caption = {
        "embedding": jnp.asarray(inputs["in.caption"], jnp.float32),
        "mask": jnp.asarray(inputs["in.emb_masks"]) > 0,
    }
    system, params = official_run(_config(meta), 1, rules, weights)
    logits, target = logits_in_order(system, params, inputs["in.tokens"], caption)
    valid = np.asarray(inputs["in.valid"], np.float32)[:, None]
    loss = (cross_entropy(logits, target) * valid).sum() / (valid.sum() * target.shape[1])
    return {
        "out.logits": logits,
        "out.loss": loss,
        "out.greedy_cfg": greedy(system, params, caption, len(valid), guidance_scale=meta["config"]["cfg_scale"]),
    }
