"""ARPG (S052, arXiv:2503.10568): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, logits_in_order, mlp, official_run
from ar_jax.interop.rules import linear, norm, prefixed, rows, stacked
from ar_jax.system import System

plain = functools.partial(linear, bias=False)


def rules(system: System) -> list[Any]:
    """The network's weights."""
    generator = system.model.generator
    vocab, classes = generator.vocab_size, generator.condition.num_classes
    table = {
        "value_embed/embedding": (0, vocab),
        "blank": (vocab, vocab + 1),
        "condition/embed/embedding": (vocab + 1, vocab + classes + 2),
    }
    contents, queries = "decoder/contents/layers/block_0", "decoder/queries/block"
    half = generator.decoder.num_layers // 2
    return prefixed(
        "",
        "generator/",
        [
            rows("embeddings.weight", table, length=vocab + classes + 3),
            stacked(half, _block("layers.self_dec.{i}", contents, f"{contents}/mixer", ("query", "key", "value"))),
            stacked(half, _block("layers.cross_dec.{i}", queries, f"{queries}/mixer/attention", ("query",))),
            norm("layers.norm", "decoder/shared_norm", bias=False),
            plain("layers.to_k", "decoder/shared/attention/key"),
            plain("layers.to_v", "decoder/shared/attention/value"),
            norm("norm", "decoder/norm", bias=False),
            plain("head", "head/logits"),
        ],
    )


def _block(official: str, ours: str, attention: str, projections: tuple[str, ...]) -> list[Any]:
    return [
        norm(f"{official}.attn_norm", f"{ours}/mixer_norm", bias=False),
        norm(f"{official}.ffn_norm", f"{ours}/mlp_norm", bias=False),
        [plain(f"{official}.attn.to_{name[0]}", f"{attention}/{name}") for name in projections],
        plain(f"{official}.attn.proj", f"{attention}/out"),
        mlp(f"{official}.ffn", f"{ours}/mlp", ("w3", "w2", "w1"), plain),
    ]


def model_config(dim: int, num_layers: int, num_heads: int, multiple_of: int = 256) -> dict[str, Any]:
    """`config.model` of ARPG: Llama's blocks in two passes, rotations on two axes."""
    hidden = -(-int(8 * dim / 3) // multiple_of) * multiple_of
    return dict(
        kind="two_pass", embed_dim=dim, num_layers=num_layers, mlp_dim=hidden, norm="rms", norm_epsilon=1e-5,
        learned_positions=False, target_positions=False,
        mixer=dict(kind="softmax", num_heads=num_heads, rope_base=10000.0, prefix_rotation="zero"),
    )  # fmt: skip


def _config(meta: Mapping[str, Any], sizes: str) -> dict[str, Any]:
    given = meta["config"]
    side = round(given["block_size"] ** 0.5)
    return dict(
        tokenizer=dict(kind="codes", grids=((side, side),), vocab_size=given["vocab_size"]),
        order=dict(kind="random"),
        feed=dict(kind="query"),
        condition=dict(kind="class"),
        head=dict(kind="categorical", use_bias=False),
        model=model_config(given["dim"], given["n_layer"], given["n_head"], given.get("multiple_of", 256)),
        sampling=dict(order=dict(kind="random", num_steps=given["num_iter"], sizes=sizes)),
    )


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Teacher-forced in a permutation; greedy generation of sets, in the order that all examples share."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    system, params = official_run(_config(meta, "arccos"), given["num_classes"], rules, weights)
    cosine, _ = official_run(_config(meta, "cosine"), given["num_classes"], rules, weights)
    logits, target = logits_in_order(system, params, inputs["in.tokens"], labels, inputs["in.orders"])
    slots = np.broadcast_to(inputs["in.gen_order"], (len(labels), len(inputs["in.gen_order"])))
    scale = given["guidance_scale"]

    def run(system: System, **drawing: Any) -> np.ndarray:
        return greedy(system, params, labels, len(labels), slots, **drawing)

    return {
        "out.logits": logits,
        "out.loss": cross_entropy(logits, target).mean(),
        "out.greedy": run(system),
        "out.greedy_cfg_linear": run(system, guidance_scale=scale, guidance_schedule="linear"),
        "out.greedy_cfg_cosine": run(cosine, guidance_scale=scale),
    }
