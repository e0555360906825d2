"""LPD (S116, arXiv:2507.01957): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, mlp, official_run
from ar_jax.interop.rules import embedding, join, linear, norm, packed_linear, prefixed, same, stacked
from ar_jax.models.generator import Context
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.system import System


def rules(system: System) -> list[Any]:
    """The network's weights."""
    generator = system.model.generator
    layer, width = "decoder/stack/layers/block_0", generator.embed_dim
    block = [
        norm("blocks.{i}.norm1", f"{layer}/mixer_norm"),
        packed_linear("blocks.{i}.attn.qkv", [f"{layer}/mixer/{n}" for n in ("query", "key", "value")]),
        linear("blocks.{i}.attn.proj", f"{layer}/mixer/out"),
        norm("blocks.{i}.norm2", f"{layer}/mlp_norm"),
        mlp("blocks.{i}.mlp", f"{layer}/mlp", ("fc1", "fc2"), linear),
    ]
    return prefixed(
        "",
        "generator/",
        [
            join({"class_emb.weight": generator.condition.num_classes, "fake_latent": 1}, "condition/embed/embedding"),
            embedding("token_emb", "value_embed"),
            same("mask_token", "blank"),
            same("pos_embed", "position_embed/embedding", shape=(1, 1 + system.model.order.length, width)),
            norm("z_proj_ln", "norm"),
            stacked(generator.decoder.num_layers, block),
            norm("norm", "decoder/norm"),
            linear("head", "head/logits", bias=False),
        ],
    )


def model_config(dim: int, num_layers: int, num_heads: int, mlp_ratio: float = 4.0) -> dict[str, Any]:
    """`config.model` of LPD: a ViT whose queries of one step read one another."""
    mixer = dict(kind="softmax", num_heads=num_heads, rope_base=0.0, qkv_bias=True, out_bias=True, query_peers=True)
    return dict(
        kind="decoder", embed_dim=dim, num_layers=num_layers, mlp_dim=int(dim * mlp_ratio), norm="layer",
        norm_epsilon=1e-6, activation="gelu_exact", gated=False, mlp_bias=True, prefix_positions=True,
        target_positions=False, embed_norm=True, mixer=mixer,
    )  # fmt: skip


def _config(meta: Mapping[str, Any], sizes: tuple[int, ...]) -> dict[str, Any]:
    given = meta["config"]
    side = given.get("img_size", 256) // given.get("vqgan_stride", 16)
    model = model_config(
        given.get("decoder_embed_dim", 1024),
        given.get("decoder_depth", 32),
        given.get("decoder_num_heads", 16),
        given.get("mlp_ratio", 4.0),
    )
    return dict(
        tokenizer=dict(kind="codes", grids=((side, side),), vocab_size=given.get("vqgan_vocab_size", 16384)),
        order=dict(kind="random", sizes=sizes),
        feed=dict(kind="query"),
        condition=dict(kind="class"),
        head=dict(kind="categorical", use_bias=False),
        model=model,
    )


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Teacher-forced in a permutation cut into groups, with and without the class; greedy generation group by group."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    sizes = tuple(int(n) for n in inputs.get("in.group_sizes", given.get("group_sizes")))
    system, params = official_run(_config(meta, sizes), given.get("class_num", 1000), rules, weights)
    read = functools.partial(_read, system, params, jnp.asarray(inputs["in.tokens"], jnp.int32), labels)
    slots = jnp.asarray(inputs["in.orders"], jnp.int32)
    hidden, logits, target = read(slots)
    run = functools.partial(greedy, system, params, labels, len(labels), inputs["in.orders"])
    scale = given.get("cfg_scale", 1.0)
    return {
        "out.hidden": hidden,
        "out.logits": logits,
        "out.loss": cross_entropy(logits, target).mean(),
        "out.logits_uncond": read(slots, drop=True)[1],
        "out.greedy": run(guidance_scale=1.0),
        "out.greedy_cfg_linear": run(guidance_scale=scale, guidance_schedule="linear_tokens"),
        "out.greedy_cfg_constant": run(guidance_scale=scale),
    }


def _read(
    system: System, params: Any, tokens: Array, labels: Array, slots: Array, drop: bool = False
) -> tuple[Array, Array, Array]:
    """Hidden vectors, logits and the tokens that they predict, by rank."""
    model, context = system.model, Context(slots, labels, jnp.full(len(tokens), drop))

    def forced(params: Any, values: Array) -> tuple[Array, Array, Array]:
        hidden, target = teacher_forced(model, model.feed.parallel(), params, values, context)
        return hidden, model.ask(params, "__call__", hidden), target

    return jax.jit(forced)(params, tokens)
