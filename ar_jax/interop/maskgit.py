"""MaskGIT's transformers as TiTok (arXiv:2406.07550) has them: the official weights' names beside ours, and replays."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.feeds.mask import masked_chunk
from ar_jax.heads.noise import Noise, Recorded
from ar_jax.interop.generators import Outputs, Weights, mlp, official_run
from ar_jax.interop.rules import linear, norm, packed_linear, prefixed, rows, same, stacked
from ar_jax.mixers.protocol import take
from ar_jax.models.generator import Context
from ar_jax.models.u_vit import UViT
from ar_jax.system import System

QKV = ("query", "key", "value")


def rules(system: System) -> list[Any]:
    """The network's weights, of a BERT or of a U-ViT."""
    generator = system.model.generator
    vocab, classes = generator.vocab_size, generator.condition.num_classes
    table = {
        "value_embed/embedding": (0, vocab),
        "blank": (vocab, vocab + 1),
        "condition/embed/embedding": (vocab + 1, vocab + classes + 2),
    }
    if not isinstance(generator.decoder, UViT):
        return prefixed("", "generator/", _bert(generator.decoder.num_layers, table))
    positions = (1, generator.condition.num_tokens + system.model.order.length, generator.embed_dim)
    return prefixed("", "generator/", _u_vit(generator.decoder.num_layers, table, positions))


def _bert(num_layers: int, table: dict[str, tuple[int, int]]) -> list[Any]:
    layer, there = "decoder/stack/layers/block_0", "model.encoder.layer.{i}"
    block = [
        [linear(f"{there}.attention.self.{name}", f"{layer}/mixer/{name}") for name in QKV],
        linear(f"{there}.attention.output.dense", f"{layer}/mixer/out"),
        norm(f"{there}.attention.output.LayerNorm", f"{layer}/mixer_norm"),
        linear(f"{there}.intermediate.dense", f"{layer}/mlp/up"),
        linear(f"{there}.output.dense", f"{layer}/mlp/down"),
        norm(f"{there}.output.LayerNorm", f"{layer}/mlp_norm"),
    ]
    return [
        rows("model.embeddings.word_embeddings.weight", table),
        same("model.embeddings.position_embeddings.weight", "position_embed/embedding"),
        rows("model.embeddings.token_type_embeddings.weight", {"common": (0, 1)}, length=2),
        norm("model.embeddings.LayerNorm", "norm"),
        stacked(num_layers, block),
        linear("model.lm_head", "head/logits"),
    ]


def _u_vit(num_layers: int, table: dict[str, tuple[int, int]], positions: tuple[int, ...]) -> list[Any]:
    return [
        rows("embeddings.weight", table),
        same("pos_embed", "position_embed/embedding", shape=positions),
        stacked(num_layers // 2, _block("in_blocks.{i}", "decoder/down/block")),
        _block("mid_block", "decoder/middle/block"),
        stacked(
            num_layers // 2,
            [*_block("out_blocks.{i}", "decoder/up/block"), linear("out_blocks.{i}.skip_linear", "decoder/up/skip")],
        ),
        norm("norm", "decoder/norm"),
        linear("lm_head", "head/logits"),
    ]


def _block(there: str, here: str) -> list[Any]:
    return [
        norm(f"{there}.norm1", f"{here}/mixer_norm"),
        packed_linear(f"{there}.attn.qkv", [f"{here}/mixer/{name}" for name in QKV], bias=False),
        linear(f"{there}.attn.proj", f"{here}/mixer/out"),
        norm(f"{there}.norm2", f"{here}/mlp_norm"),
        mlp(f"{there}.mlp", f"{here}/mlp", ("fc1", "fc2"), linear),
    ]


def model_config(kind: str, dim: int, num_layers: int, num_heads: int, mlp_dim: int) -> dict[str, Any]:
    """`config.model` of kind "bert", post-norm blocks, or "u_vit", pre-norm ones with skips."""
    bert = kind == "bert"
    return dict(
        kind="decoder" if bert else "u_vit", embed_dim=dim, num_layers=num_layers, mlp_dim=mlp_dim, norm="layer",
        norm_epsilon=1e-12 if bert else 1e-5, norm_first=not bert, activation="gelu_exact", gated=False, mlp_bias=True,
        prefix_positions=True, target_positions=False, embed_norm=bert, common=bert,
        mixer=dict(kind="softmax", num_heads=num_heads, rope_base=0.0, qkv_bias=bert, out_bias=True),
    )  # fmt: skip


def _config(meta: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    given = meta["config"]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    kind = "u_vit" if "mid_block.norm1.weight" in weights else "bert"
    return dict(
        tokenizer=dict(kind="codes", grids=((given["image_seq_len"],),), vocab_size=given["codebook_size"]),
        order=dict(kind="random"),
        objective=dict(
            kind="masked", schedule="arccos", known_weight=given["loss_weight_unmasked_token"],
            label_smoothing=given["label_smoothing"],
        ),
        condition=dict(kind="class"),
        model=model_config(kind, *(given[name] for name in names)),
        sampling=dict(
            order=dict(kind="random", num_steps=given["num_sample_steps"], sizes="arccos", adaptive=True)
        ),
    )  # fmt: skip


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Logits and loss under masks; generation by confidence, without noise and with recorded noise."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    system, params = official_run(_config(meta, weights), given["condition_num_classes"], rules, weights)
    tokens, mask = jnp.asarray(inputs["in.tokens"], jnp.int32), jnp.asarray(inputs["in.masks"])
    hidden = hidden_under_mask(system, params, tokens, mask, labels)
    smoothing = system.objective.label_smoothing
    loss = system.model.ask(params, "loss", hidden, tokens, jax.random.key(0), label_smoothing=smoothing)
    weight = jnp.where(mask > 0, 1.0, system.objective.known_weight)
    run, scale = functools.partial(_sampled, system, params, labels, inputs), given["guidance_scale"]
    return {
        "out.logits": system.model.ask(params, "__call__", hidden),
        "out.logits_uncond": system.model.ask(
            params, "__call__", hidden_under_mask(system, params, tokens, mask, labels, drop=True)
        ),
        "out.loss": (loss * weight).sum() / weight.sum(),
        "out.greedy_linear": run(0.0, guidance_scale=1 + scale, guidance_schedule="linear_before"),
        "out.greedy_constant": run(0.0, "annealed", guidance_scale=1 + scale),
        "out.sample_power": run(
            given["randomize_temperature"],
            guidance_scale=scale,
            guidance_schedule="cosine",
            guidance_power=given["guidance_scale_pow"],
        ),
    }


def hidden_under_mask(
    system: System, params: Any, tokens: Array, mask: Array, labels: Array, drop: bool = False
) -> Array:
    """Hidden vectors [B, L, D] on their slots where mask [B, L] hides tokens."""
    model, batch = system.model, len(tokens)
    slots = jnp.argsort(mask, axis=1, stable=True).astype(jnp.int32)  # what is known comes first
    chunk = masked_chunk(model.order.length, model.num_prefix, (1 - mask).sum(axis=1))
    context = Context(slots, labels, jnp.full(batch, drop))
    hidden, _ = jax.jit(lambda params, tokens: model.read(params, tokens, context, chunk))(params, tokens)
    return take(hidden[:, model.num_prefix :], jnp.argsort(slots, axis=1))


def _sampled(
    system: System,
    params: Any,
    labels: Array,
    inputs: Weights,
    temperature: float,
    cooling: str = "linear",
    **drawing: Any,
) -> np.ndarray:
    """Tokens [B, L] int64 from the recorded noise."""
    uniforms = {"token": jnp.asarray(inputs["in.u_tokens"]), "confidence": jnp.asarray(inputs["in.u_confidence"])}

    def recorded(step: Any, slots: Array) -> Noise:
        return Recorded({name: take(array[step], slots) for name, array in uniforms.items()})

    slots = system.model.order.length
    context = Context(
        jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (len(labels), slots)),
        labels,
        jnp.zeros(len(labels), bool),
    )
    told = system.drawing(temperature=temperature, temperature_schedule=cooling, **drawing)
    sample = jax.jit(lambda params, context: system.sample_in_order(params, context, recorded, told))
    return np.asarray(sample(params, context), np.int64)
