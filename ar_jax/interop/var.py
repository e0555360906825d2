"""VAR (S023, arXiv:2404.02905): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.heads.filters import filtered
from ar_jax.heads.protocol import Sampling
from ar_jax.interop import tokenizers
from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, logits_in_order, mlp, official_run
from ar_jax.interop.rules import (
    embedding,
    flattened,
    join,
    linear,
    packed_linear,
    prefixed,
    same,
    sections,
    stacked,
    unused,
)
from ar_jax.system import System
from ar_jax.tokenizers.learned import LearnedTokenizer

SIX = sections((4, 2, 0, 5, 3, 1))  # there gate 1 and 2, scale 1 and 2, shift 1 and 2; here shift, scale, gate of each


def rules(system: System) -> list[Any]:
    """The network's weights; those of its tokenizer are in a file of their own."""
    return prefixed("", "generator/", network(system, _block(system)))


def both(system: System) -> list[Any]:
    """The network's weights, `var.*`, and its tokenizer's, `vae.*`, in one file."""
    return with_tokenizer(system, prefixed("var.", "", rules(system)))


def with_tokenizer(system: System, own: list[Any]) -> list[Any]:
    """The rules of a network, and those of VAR's tokenizer, `vae.*`, in the same file."""
    return [
        own,
        prefixed("vae.", "tokenizer/", tokenizers.var_vqvae(cast(LearnedTokenizer, system.tokenizer))),
    ]


def network(system: System, block: list[Any]) -> list[Any]:
    """All weights of the network, of whose blocks one is given, with `{i}` for its number."""
    generator, decoder = system.model.generator, system.model.generator.decoder
    places = {"pos_start": generator.condition.num_tokens, "pos_1LC": system.model.order.length}
    shared = linear("shared_ada_lin.1", "decoder/shared_modulation/project", layout=SIX)
    return [
        linear("word_embed", "value_embed"),
        embedding("class_emb", "condition/embed"),
        join(places, "position_embed/embedding", lead=1),
        embedding("lvl_embed", "level_embed"),
        shared if generator.options.adaln == "shared" else [],
        stacked(decoder.num_layers // len(decoder.mixers), block),
        linear("head_nm.ada_lin.1", "decoder/norm_modulation/project", layout=sections((1, 0))),
        linear("head", "head/logits"),
        unused("lvl_1L", "attn_bias_for_masking"),
    ]


def _block(system: System) -> list[Any]:
    generator, decoder, layer = system.model.generator, system.model.generator.decoder, "decoder/stack/layers/block_0"
    return [
        _modulation(layer, generator.options.adaln, decoder.embed_dim),
        *attention(layer, decoder.mixers[0]()),
        mlp("blocks.{i}.ffn", f"{layer}/mlp", ("fc1", "fc2"), linear),
    ]


def attention(layer: str, mixer: Any) -> list[Any]:
    """The attention of block `{i}`, which is the mixer of our layer."""
    found = [
        packed_linear("blocks.{i}.attn.mat_qkv", [f"{layer}/mixer/{n}" for n in ("query", "key", "value")], bias=False),
        same("blocks.{i}.attn.q_bias", f"{layer}/mixer/query/bias"),
        same("blocks.{i}.attn.v_bias", f"{layer}/mixer/value/bias"),
        unused("blocks.{i}.attn.zero_k_bias"),
        linear("blocks.{i}.attn.proj", f"{layer}/mixer/out"),
    ]
    if mixer.qk_norm == "l2":
        found += [same("blocks.{i}.attn.scale_mul_1H11", f"{layer}/mixer/log_scale", shape=(1, mixer.num_heads, 1, 1))]
    return found


def _modulation(layer: str, adaln: str, embed_dim: int) -> list[Any]:
    if adaln == "block":
        return linear("blocks.{i}.ada_lin.1", f"{layer}/modulation/project", layout=SIX)
    return [same("blocks.{i}.ada_gss", f"{layer}/modulation_bias", shape=(1, 1, 6, embed_dim), layout=flattened(SIX))]


def model_config(
    dim: int, num_layers: int, num_heads: int, shared_adaln: bool = False, l2_norm: bool = True, mlp_ratio: float = 4.0
) -> dict[str, Any]:
    """`config.model` of VAR: a ViT with adaLN, told the class, its place and its scale."""
    logits = dict(qk_norm="l2") if l2_norm else dict(logit_scale=0.25 * (dim // num_heads) ** -0.5)
    return dict(
        kind="decoder", embed_dim=dim, num_layers=num_layers, mlp_dim=round(dim * mlp_ratio), norm="plain",
        adaln="shared" if shared_adaln else "block", activation="gelu", gated=False, mlp_bias=True,
        prefix_positions=True, target_positions=False, level_positions=True,
        mixer=dict(kind="softmax", num_heads=num_heads, rope_base=0.0, qkv_bias=True, key_bias=False, out_bias=True) | logits,
    )  # fmt: skip


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    given = meta["config"]
    sizes = (given["embed_dim"], given["depth"], given["num_heads"])
    model = model_config(*sizes, given["shared_aln"], given["attn_l2_norm"], given["mlp_ratio"])
    return around(meta, model | {"norm_epsilon": given["norm_eps"]})


def around(meta: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an official run on VAR's tokenizer, around `config.model`."""
    vae = meta["config"]["vae"]
    side = vae["patch_nums"][-1] * 2 ** (len(vae["ch_mult"]) - 1)
    return dict(
        image_shape=(side, side, 3),
        tokenizer=tokenizers.tokenizer_of({"config": vae}, {}),
        order=dict(kind="next_scale"),
        condition=dict(kind="class", copies=vae["patch_nums"][0] ** 2),
        model=model,
    )


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """As `replayed`, and what is fed to the network, and the filters."""
    options = meta["config"]["filter"]
    settings = Sampling(1.0, options.get("top_k") or None, options.get("top_p") or None)  # 0 is none
    system, params = official_run(_config(meta), meta["config"]["num_classes"], both, weights)
    tokens = jnp.asarray(inputs["in.tokens"], jnp.int32)
    fed = np.arange(system.model.order.sizes[0], system.model.order.length)
    return replayed(system, params, inputs, meta["config"]["cfg_scale"]) | {
        "out.var_input": system.tokenizer.resample(params["tokenizer"], tokens, fed),
        "out.filtered_probs": jax.nn.softmax(filtered(jnp.asarray(inputs["in.filter_logits"]), settings)),
    }


def replayed(system: System, params: Any, inputs: Weights, cfg_scale: float) -> Outputs:
    """Teacher-forced with and without the class; greedy generation with and without guidance, and its images."""
    labels, tokens = (jnp.asarray(inputs[f"in.{name}"], jnp.int32) for name in ("classes", "tokens"))
    logits, target = logits_in_order(system, params, tokens, labels)
    run = functools.partial(greedy, system, params, labels, len(labels))
    plain, guided = run(), run(guidance_scale=1 + cfg_scale, guidance_schedule="linear_steps")
    decode = jax.jit(lambda tokens: (system.tokenizer.decode(params["tokenizer"], tokens) + 1) / 2)
    return {
        "out.logits": logits,
        "out.logits_uncond": logits_in_order(system, params, tokens, labels, drop=True)[0],
        "out.loss": cross_entropy(logits, target).mean(),
        "out.greedy_tokens": plain,
        "out.greedy_image": jnp.moveaxis(decode(plain), -1, 1),
        "out.greedy_cfg_tokens": guided,
        "out.greedy_cfg_image": jnp.moveaxis(decode(guided), -1, 1),
    }
