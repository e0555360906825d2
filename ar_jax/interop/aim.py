"""AiM (S082, arXiv:2408.12245): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ar_jax.config import UsageError
from ar_jax.interop import tokenizers
from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, logits_in_order, official_run
from ar_jax.interop.mixers.mamba import fields_of, mamba2_rules, mamba_rules
from ar_jax.interop.rules import (
    Rule,
    copied,
    embedding,
    flattened,
    linear,
    norm,
    packed_linear,
    prefixed,
    rows,
    same,
    sections,
    stacked,
)
from ar_jax.mixers.mamba2 import Mamba2
from ar_jax.system import System
from ar_jax.tokenizers.learned import LearnedTokenizer

# Of a block: there all shifts, then scales, then gates; here shift, scale and gate of the mixer, then of the MLP.
ORDER = {3: (0, 1, 2), 6: (0, 2, 4, 1, 3, 5)}


def rules(system: System) -> list[Any]:
    """The network's weights in the published file, `mamba.*`; a code has the place that it had in training."""
    return prefixed("mamba.", "generator/", _network(system, first_row=0))


def rules_as_sampled(system: System) -> list[Any]:
    """The same, but a code has the place behind its own, as in the official sampling."""
    return prefixed("mamba.", "generator/", _network(system, first_row=1))


def tokenizer_rules(tokenizer: LearnedTokenizer) -> list[Rule]:
    """The tokenizer's weights in the published file, `vqvae.*`: LlamaGen's."""
    return prefixed("vqvae.", "", tokenizers.llamagen_vq(tokenizer))


def _network(system: System, first_row: int) -> list[Any]:
    generator, length = system.model.generator, system.model.order.length
    tied = generator.head.tied
    table = "backbone.embeddings.word_embeddings"
    places = {"position_embed/embedding": (first_row, first_row + length)}
    return [
        embedding(table, "head/table" if tied else "value_embed"),
        copied("lm_head.weight", of=f"{table}.weight") if tied else linear("lm_head", "head/logits", bias=False),
        rows("backbone.embeddings.position_embeddings.weight", places, length=length + 1),
        embedding("backbone.cls_embed.embedding_table", "condition/embed"),
        _blocks(generator),
        _norm("backbone.norm_f", "decoder/norm/first", generator.options.norm),
        _norm("backbone.final_layer.norm_final", "decoder/norm/second", "rms"),
        linear("backbone.final_layer.adaLN_modulation.1", "decoder/norm_modulation/project"),
    ]


def _norm(official: str, ours: str, kind: str) -> list[Rule]:
    return norm(official, ours, bias=kind == "layer")


def _blocks(generator: Any) -> list[Any]:
    options, layer = generator.options, "decoder/stack/layers/block_0"
    mixer = generator.decoder.mixers[0]()
    own = mamba2_rules(mixer) if isinstance(mixer, Mamba2) else mamba_rules(mixer)
    with_mlp = options.mlps == "all"
    count = options.num_modulations(with_mlp)
    block: list[Any] = [
        _norm("layers.{i}.norm", f"{layer}/mixer_norm", options.norm),
        prefixed("layers.{i}.mixer.", f"{layer}/mixer/", own),
    ]
    if with_mlp:
        block += [
            _norm("layers.{i}.norm2", f"{layer}/mlp_norm", options.norm),
            packed_linear("layers.{i}.mlp.fc1", [f"{layer}/mlp/{n}" for n in ("up", "gate")], bias=False),
            linear("layers.{i}.mlp.fc2", f"{layer}/mlp/down", bias=False),
        ]
    projection: list[Any] = []
    if options.adaln == "block":
        official, ours = "layers.{i}.adaLN_modulation.1", f"{layer}/modulation/project"
        block.append(linear(official, ours, layout=sections(ORDER[count])))
    else:
        groups = [count * group + k for group in range(options.adaln_groups) for k in ORDER[count]]
        projection = linear("adaln_group.1", "decoder/shared_modulation/project", layout=sections(groups))
        shape, layout = (1, count, generator.embed_dim), flattened(sections(ORDER[count]))
        block.append(same("layers.{i}.scale_shift_table", f"{layer}/modulation_bias", shape=shape, layout=layout))
    return prefixed("backbone.", "", [projection, stacked(generator.decoder.num_layers, block)])


def model_config(
    dim: int, num_layers: int, adaln_groups: int = 0, mlp_dim: int = 0, norm: str = "rms", **mixer: Any
) -> dict[str, Any]:
    """`config.model` of AiM: Mamba-2 behind a norm that the class shifts, scales and gates, and no MLP.

    Args:
      dim: width.
      num_layers: how many.
      adaln_groups: projections of the class that the layers share; 0 gives each layer its own.
      mlp_dim: with an MLP behind each mixer.
      norm: "rms" or "layer".
      **mixer: further keys of `config.model.mixer`.
    """
    shared = dict(adaln="shared", adaln_groups=adaln_groups) if adaln_groups else dict(adaln="block")
    mlps = dict(mlps="all", mlp_dim=mlp_dim) if mlp_dim else dict(mlps="none")
    return dict(
        kind="decoder", embed_dim=dim, num_layers=num_layers, norm=norm, norm_epsilon=1e-5,
        last_norm="rms_twice" if norm == "rms" else "layer_rms", target_positions=False,
        mixer=dict(kind="mamba2") | mixer,
    ) | shared | mlps  # fmt: skip


def _config(meta: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    given = meta["config"]
    if given.get("attn_layer_idx"):
        raise UsageError("attn_layer_idx: layers of attention are not replayed; give a run without them.")
    if given.get("d_intermediate") and not given.get("fused_add_norm", True):
        raise UsageError("d_intermediate is replayed with fused_add_norm only: without it the MLP lacks its norm.")
    layer = "backbone.layers.0."
    kind = "mamba" if f"{layer}mixer.dt_proj.weight" in weights else "mamba2"
    told = {key: given[key] for key in ("expand", "d_conv") if key in given} | dict(given.get("ssm_cfg") or {})
    model = model_config(
        given["d_model"],
        given["n_layer"],
        given.get("num_groups", 1) if given.get("adaln_group") else 0,
        weights[f"{layer}mlp.fc2.weight"].shape[1] if given.get("d_intermediate") else 0,
        "rms" if given.get("rms_norm", True) else "layer",
        **{"kind": kind} | fields_of(told),
    )
    length = given["num_tokens"]
    side = round(length**0.5)
    return dict(
        tokenizer=dict(
            kind="codes", grids=((side, side) if side**2 == length else (1, length),), vocab_size=given["vocab_size"]
        ),
        order=dict(kind="raster"),
        condition=dict(kind="class"),
        head=dict(kind="categorical", use_bias=False, tied=given.get("tie_embeddings", True)),
        model=model,
    )


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Teacher-forced with the places of training and of sampling; greedy generation with and without guidance."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    config = _config(meta, weights)
    by_places = [functools.partial(_replayed, first_row=row) for row in (0, 1)]
    (system, trained), (_, sampled) = (official_run(config, given["num_classes"], r, weights) for r in by_places)
    logits, target = logits_in_order(system, trained, inputs["in.tokens"], labels)
    return {
        "out.logits": logits,
        "out.loss": cross_entropy(logits, target).mean(),
        "out.logits_shifted": logits_in_order(system, sampled, inputs["in.tokens"], labels)[0],
        "out.greedy": greedy(system, sampled, labels, len(labels)),
        "out.greedy_cfg": greedy(system, sampled, labels, len(labels), guidance_scale=given["cfg_scale"]),
    }


def _replayed(system: System, first_row: int) -> list[Any]:
    """The network's weights alone."""
    return prefixed("", "generator/", _network(system, first_row))
