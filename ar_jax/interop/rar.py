"""RAR (S045, arXiv:2411.00776): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.feeds.protocol import NOWHERE, Feed, chunk
from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, logits_in_order, mlp, official_run
from ar_jax.interop.rules import linear, norm, packed_linear, prefixed, rows, same, sections, stacked
from ar_jax.models.generator import Context
from ar_jax.system import System

SPARE_PLACES, SPARE_STEPS = 1024, 100  # rows of the official tables beyond the image's tokens


def rules(system: System) -> list[Any]:
    """The network's weights."""
    generator, length = system.model.generator, system.model.order.length
    vocab, classes = generator.vocab_size, generator.condition.num_classes
    codes = {"value_embed/embedding": (0, vocab), "condition/embed/embedding": (vocab + 1, vocab + classes + 2)}
    layer = "decoder/stack/layers/block_0"
    block = [
        linear("blocks.{i}.adaLN_modulation.1", f"{layer}/modulation/project"),
        norm("blocks.{i}.norm1", f"{layer}/mixer_norm"),
        norm("blocks.{i}.norm2", f"{layer}/mlp_norm"),
        packed_linear("blocks.{i}.attn.qkv", [f"{layer}/mixer/{n}" for n in ("query", "key", "value")]),
        norm("blocks.{i}.attn.q_norm", f"{layer}/mixer/query_norm"),
        norm("blocks.{i}.attn.k_norm", f"{layer}/mixer/key_norm"),
        linear("blocks.{i}.attn.proj", f"{layer}/mixer/out"),
        mlp("blocks.{i}.mlp", f"{layer}/mlp", ("fc1", "fc2"), linear),
    ]
    places, steps = length + SPARE_PLACES, length + SPARE_STEPS
    return prefixed(
        "",
        "generator/",
        [
            rows("embeddings.weight", codes, length=vocab + classes + 2),
            same("cls_token", "condition/start"),
            rows("pos_embed", {"position_embed/embedding": (0, length + 2)}, places, lead=1),
            rows("target_aware_pos_embed", {"target_embed/embedding": (2, length + 2)}, places, lead=1),
            rows("timesteps_embeddings", {"rank_embed/embedding": (0, length + 2)}, steps, lead=1),
            stacked(generator.decoder.num_layers, block),
            linear("adaln_before_head.adaLN_modulation.1", "decoder/norm_modulation/project", layout=sections((1, 0))),
            linear("lm_head", "head/logits"),
        ],
    )


def model_config(dim: int, num_layers: int, num_heads: int, mlp_dim: int) -> dict[str, Any]:
    """`config.model` of RAR: a ViT with adaLN, told the class, the step, its own place and the place to fill."""
    mixer = dict(kind="softmax", num_heads=num_heads, rope_base=0.0, qk_norm="layer", qkv_bias=True, out_bias=True)
    return dict(
        kind="decoder", embed_dim=dim, num_layers=num_layers, mlp_dim=mlp_dim, norm="layer", last_norm="plain",
        adaln="block", activation="gelu_exact", gated=False, mlp_bias=True, prefix_positions=True,
        rank_modulation=True, mixer=mixer,
    )  # fmt: skip


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    given = meta["config"]
    side = round(given["image_seq_len"] ** 0.5)
    model = model_config(
        given["hidden_size"], given["num_hidden_layers"], given["num_attention_heads"], given["intermediate_size"]
    )
    return dict(
        tokenizer=dict(kind="codes", grids=((side, side),), vocab_size=given["codebook_size"]),
        order=dict(kind="raster"),
        condition=dict(kind="class", start_token=True),
        model=model,
    )


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Teacher-forced in a permutation, in raster order and without the class; greedy generation with and without guidance."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    system, params = official_run(_config(meta), given["condition_num_classes"], rules, weights)
    read = functools.partial(logits_in_order, system, params, inputs["in.tokens"], labels)
    orders = inputs["in.orders"]
    permuted, target = read(slots=orders)
    raster, raster_target = read()
    run = functools.partial(greedy, system, params, labels, len(labels))
    guidance = dict(guidance_schedule="cosine", guidance_power=given["guidance_scale_pow"])
    with_last = functools.partial(_all_logits, system, params, inputs["in.tokens"], labels)
    return {
        "out.logits": with_last(orders),
        "out.labels": target,
        "out.loss": cross_entropy(permuted, target).mean(),
        "out.logits_raster": with_last(None),
        "out.loss_raster": cross_entropy(raster, raster_target).mean(),
        "out.logits_uncond": with_last(orders, drop=True),
        "out.greedy": run(),
        "out.greedy_cfg": run(guidance_scale=given["guidance_scale"], **guidance),
    }


def _all_logits(system: System, params: Any, tokens: Any, labels: Any, slots: Any = None, drop: bool = False) -> Array:
    """[B, L + 1, V]: also what follows the last token, which the official network computes and nobody uses."""
    model, batch, length = system.model, len(tokens), system.model.order.length
    own = model.order.slots(None, batch) if slots is None else jnp.asarray(slots, jnp.int32)
    context = Context(own, labels, jnp.full(batch, drop))
    behind = chunk(source=[length - 1], place=[length - 1], target=[NOWHERE], step=[length])
    whole = Feed((*model.feed.chunks, behind)).parallel()

    def forced(params: Any, values: Array) -> Array:
        hidden, _ = model.read(params, values, context, whole)
        return model.ask(params, "__call__", hidden[:, model.num_prefix - 1 :])

    return jax.jit(forced)(params, jnp.asarray(tokens, jnp.int32))
