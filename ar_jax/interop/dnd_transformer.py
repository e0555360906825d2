"""DnD-Transformer (S171, arXiv:2410.01912): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.interop import llamagen
from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, logits_in_order, official_run
from ar_jax.interop.rules import copied, embedding, norm, prefixed, same, stacked, unused
from ar_jax.system import System

OF_A_LAYER = (
    "attention_norm", "attention.wqkv", "attention.wo", "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip


def rules(system: System, num_layers: int = 0) -> list[Any]:
    """The network's weights; official layers behind the last head, up to num_layers, do nothing."""
    generator = system.model.generator
    counts = (generator.decoder.num_layers, *generator.decoder.branch_layers)
    ends = np.cumsum(counts)
    stacks = ["decoder/stack", *(f"decoder/branches_{i}" for i in range(len(counts) - 1))]
    norms = ["decoder/norm", *(f"decoder/branch_norms_{i}" for i in range(len(counts) - 1))]
    spare = range(int(ends[-1]), num_layers)
    return prefixed(
        "",
        "generator/",
        [
            embedding("tok_embeddings", "value_embed"),
            _condition(system),
            [llamagen.layers(range(e - n, e), stack) for n, e, stack in zip(counts, ends, stacks, strict=True) if n],
            [norm(f"norm.{i}", ours, bias=False) for i, ours in enumerate(norms)],
            _heads(len(counts), generator.head.num_outputs),
            [unused(f"layers.{i}.{name}.weight") for i in spare for name in OF_A_LAYER],
        ],
    )


def _condition(system: System) -> list[Any]:
    """The embedding of classes; a start token is the only row of one without guidance."""
    told = system.model.generator.condition
    if hasattr(told, "num_classes"):
        return llamagen.condition(system)
    width = system.model.generator.embed_dim
    return [same("cls_embedding.embedding_table.weight", "condition/start", shape=(1, width))]


def _heads(num_outputs: int, own: int) -> list[Any]:
    """Each output's own head, or one that all share."""
    if own > 1:
        return stacked(num_outputs, llamagen.plain("output.{i}", "head/logits"))
    shared = [copied(f"output.{i}.weight", of="output.0.weight") for i in range(1, num_outputs)]
    return [*llamagen.plain("output.0", "head/logits"), *shared]


def in_depth(positions: Sequence[int]) -> dict[str, Any]:
    """The keys of `config.model` for heads behind the layers of these numbers."""
    first, *further = np.diff([-1, *positions]).tolist()
    return dict(num_layers=first, branch_layers=tuple(further), reads_answers=True, merge="sum")


def model_config(dim: int, num_heads: int, positions: Sequence[int], multiple_of: int = 256) -> dict[str, Any]:
    """`config.model`: LlamaGen's, which draws a code of the same place behind each of several layers."""
    size = llamagen.model_config(dim, 0, num_heads, multiple_of)
    return size | in_depth(positions)


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    given = meta["config"]
    config = llamagen.from_arguments({"vocab_size": 16384, "block_size": 256} | dict(given))
    positions = given.get("pred_head_positions", (39, 47))
    ((rows, columns),) = config["tokenizer"]["grids"]
    config["tokenizer"]["grids"] = ((rows, columns, len(positions)),)
    config["model"] |= in_depth(positions)
    config["head"]["num_outputs"] = 1 if given.get("share_prediction_heads", 0) else len(positions)
    return config | dict(order=dict(kind="raster"), feed=dict(kind="merge"))


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Teacher-forced logits of every depth and their loss; greedy generation with and without guidance."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    made = functools.partial(rules, num_layers=given.get("n_layer", 32))
    system, params = official_run(_config(meta), given.get("num_classes", 1000), made, _with_null(weights, given))
    tokens = np.asarray(inputs["in.tokens"])
    batch, _, depth = tokens.shape
    logits, target = logits_in_order(system, params, tokens.reshape(batch, -1), labels)
    run = functools.partial(greedy, system, params, labels, batch)
    return {
        "out.logits": jnp.moveaxis(logits.reshape(batch, -1, depth, logits.shape[-1]), 2, 1),
        "out.loss": cross_entropy(logits, target).mean(),
        "out.greedy": run(guidance_scale=1.0),
        "out.greedy_cfg": run(guidance_scale=max(given.get("cfg_scale", 1.0), 1.0)),
    }


def _with_null(weights: Weights, given: Mapping[str, Any]) -> Weights:
    """The weights with a row for no class, which a model trained without guidance does not have, and does not read."""
    name = "cls_embedding.embedding_table.weight"
    if name not in weights or given.get("class_dropout_prob", 0.1) > 0:
        return weights
    return {**weights, name: np.concatenate([weights[name], np.zeros_like(weights[name][:1])])}
