"""Official image tokenizers: their weights' names beside ours, and their sizes as our configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ar_jax.interop.rules import (
    POINTWISE,
    Rule,
    conv,
    copied,
    each,
    embedding,
    linear,
    norm,
    packed_linear,
    prefixed,
    rows,
    same,
    split,
    stacked,
    unused,
)
from ar_jax.tokenizers.conv import ConvOptions
from ar_jax.tokenizers.learned import LearnedTokenizer
from ar_jax.tokenizers.vit import ViTSize


@dataclasses.dataclass(frozen=True)
class Names:
    """What an official convolutional network calls its modules.

    Attributes:
      down: a level of the encoder; {level} counts from full resolution, {depth} from the lowest.
      up: a level of the decoder.
      block: a residual block {i} of a level.
      middle: the blocks at the bottom.
      middle_attention: the attention between them.
      upsample: the convolution behind a doubling, inside a level.
      packed: whether queries, keys and values are one convolution.
    """

    down: str = "down.{level}."
    up: str = "up.{level}."
    block: str = "block.{i}"
    middle: str = "mid.block_{number}"
    middle_attention: str = "mid.attn_1"
    upsample: str = "upsample.conv"
    packed: bool = False


LDM = Names()
LLAMAGEN = Names(
    "conv_blocks.{level}.", "conv_blocks.{depth}.", "res.{i}", middle="mid.{even}", middle_attention="mid.1"
)
MASKGIT = Names(middle="mid.{i}", upsample="upsample_conv")


def llamagen_vq(tokenizer: LearnedTokenizer) -> list[Rule]:
    """LlamaGen's VQ (arXiv:2406.06525); its buffer of codes seen lately is not needed."""
    return [
        *_encoder(tokenizer.network.encoder.options, LLAMAGEN, "encoder."),
        *_decoder(tokenizer.network.decoder.options, LLAMAGEN, "decoder."),
        *_quantization(),
        *unused("quantize.codebook_used", required=False),
    ]


def var_vqvae(tokenizer: LearnedTokenizer) -> list[Rule]:
    """VAR's multi-scale VQVAE (arXiv:2404.02905); its counter of used codes is not needed."""
    names, quantizer = dataclasses.replace(LDM, packed=True), tokenizer.network.quantizer
    phi = {0: "quantize.quant_resi.{i}", 1: "quantize.quant_resi.qresi"}
    official = phi.get(quantizer.num_phi, "quantize.quant_resi.qresi_ls.{i}")
    return [
        *_encoder(tokenizer.network.encoder.options, names, "encoder."),
        *_decoder(tokenizer.network.decoder.options, names, "decoder."),
        *_quantization(),
        *each(quantizer.used_phi, [conv(official, "quantizer/phi_{i}")]),
        *each(
            [i for i in range(quantizer.num_phi) if i not in quantizer.used_phi],
            unused(f"{official}.weight", f"{official}.bias"),
        ),
        *unused("quantize.ema_vocab_hit_SV", required=False),
    ]


def rq_vae(tokenizer: LearnedTokenizer) -> list[Rule]:
    """RQ-VAE (arXiv:2203.01941) with one table for all depths; its padding, counts and sums are not needed."""
    quantizer, table = tokenizer.network.quantizer, "quantizer.codebooks.{}.weight"
    sums = ("cluster_size_ema", "embed_ema")
    return [
        *_encoder(tokenizer.network.encoder.options, LDM, "encoder."),
        *_decoder(tokenizer.network.decoder.options, LDM, "decoder."),
        *_quant_convs(),
        rows(table.format(0), {"quantizer/codebook/embedding": (0, quantizer.vocab_size)}, quantizer.vocab_size + 1),
        *(copied(table.format(i), of=table.format(0)) for i in range(1, quantizer.depth)),
        *unused(*(f"quantizer.codebooks.{i}.{n}" for i in range(quantizer.depth) for n in sums), required=False),
    ]


def mar_kl(tokenizer: LearnedTokenizer) -> list[Rule]:
    """MAR's KL autoencoder (arXiv:2406.11838), which is latent diffusion's."""
    return [
        *_encoder(tokenizer.network.encoder.options, LDM, "encoder."),
        *_decoder(tokenizer.network.decoder.options, LDM, "decoder."),
        *_quant_convs(),
    ]


def maskgit_vqgan(tokenizer: LearnedTokenizer) -> list[Rule]:
    """MaskGIT's VQGAN (arXiv:2202.04200) as the 1d-tokenizer and open-muse repositories name it."""
    return [
        *_encoder(tokenizer.network.encoder.options, MASKGIT, "encoder."),
        *_decoder(tokenizer.network.decoder.options, MASKGIT, "decoder."),
        *embedding("quantize.embedding", "quantizer/codebook"),
    ]


def titok(tokenizer: LearnedTokenizer) -> list[Rule]:
    """TiTok (arXiv:2406.07550), with proxy codes or with pixels."""
    encoder, decoder, quantizer = (getattr(tokenizer.network, part) for part in ("encoder", "decoder", "quantizer"))
    return [
        same("latent_tokens", "encoder/latent_tokens"),
        *prefixed("encoder.", "encoder/", _titok_encoder(encoder.size)),
        *prefixed("decoder.", "decoder/", _titok_decoder(decoder.size)),
        *(embedding("quantize.embedding", "quantizer/codebook") if quantizer.vocab_size else []),
        *(_proxy_head(decoder.head.options) if encoder.scrambled else _pixel_head()),
    ]


def _titok_encoder(size: ViTSize) -> list[Any]:
    return [
        conv("patch_embed", "patch_embed"),
        _tables(),
        _transformer(size),
        linear("conv_out", "out", layout=POINTWISE),
    ]


def _titok_decoder(size: ViTSize) -> list[Any]:
    return [
        linear("decoder_embed", "value_embed"),
        same("mask_token", "mask_token", shape=(1, 1, -1)),
        _tables(),
        _transformer(size),
    ]


def _tables() -> list[Rule]:
    return [
        same("class_embedding", "class_embedding"),
        same("positional_embedding", "position_embedding"),
        same("latent_token_positional_embedding", "latent_position_embedding"),
    ]


def _transformer(size: ViTSize) -> list[Any]:
    layer = [
        norm("ln_1", "attention_norm"),
        split("attn.in_proj_weight", [f"{name}/kernel" for name in ("query", "key", "value")]),
        split("attn.in_proj_bias", [f"{name}/bias" for name in ("query", "key", "value")]),
        linear("attn.out_proj", "out"),
        norm("ln_2", "mlp_norm"),
        linear("mlp.c_fc", "up"),
        linear("mlp.c_proj", "down"),
    ]
    return [
        norm("ln_pre", "transformer/norm_in"),
        stacked(size.num_layers, prefixed("transformer.{i}.", "transformer/layers/", layer)),
        norm("ln_post", "transformer/norm_out"),
    ]


def _pixel_head() -> list[Rule]:
    return [
        *linear("decoder.ffn.0", "decoder/head/to_pixels", layout=POINTWISE),
        *conv("decoder.conv_out", "decoder/head/conv_out"),
    ]


def _proxy_head(options: ConvOptions) -> list[Rule]:
    return [
        *linear("decoder.ffn.0", "decoder/head/hidden", layout=POINTWISE),
        *linear("decoder.ffn.2", "decoder/head/logits", layout=POINTWISE),
        *embedding("pixel_quantize.embedding", "decoder/head/proxies"),
        *_decoder(options, MASKGIT, "pixel_decoder.", "decoder/head/pixel_decoder/"),
    ]


def _quantization() -> list[Rule]:
    return [*_quant_convs(), *embedding("quantize.embedding", "quantizer/codebook")]


def _quant_convs() -> list[Rule]:
    return [*conv("quant_conv", "encoder/quant_conv"), *conv("post_quant_conv", "decoder/post_quant_conv")]


def _encoder(options: ConvOptions, names: Names, official: str, ours: str = "encoder/") -> list[Rule]:
    last, bias, rules = len(options.widths) - 1, options.conventions.block_bias, []
    for level, changes in _levels(options, options.num_res_blocks, downwards=True):
        there, here = names.down.format(level=level, depth=last - level), f"level_{level}/"
        attends = level == last and "encoder" in options.attention
        rules += _level(there, here, changes, attends, names, bias)
        if level < last and not options.conventions.pooled:
            rules += conv(f"{there}downsample.conv", f"{here}down")
    return prefixed(official, ours, [conv("conv_in", "conv_in", bias), rules, _ends(options, names)])


def _decoder(options: ConvOptions, names: Names, official: str, ours: str = "decoder/") -> list[Rule]:
    last, bias, rules = len(options.widths) - 1, options.conventions.block_bias, []
    num_blocks = options.num_res_blocks + options.conventions.extra_decoder_blocks
    for level, changes in _levels(options, num_blocks, downwards=False):
        there, here = names.up.format(level=level, depth=last - level), f"level_{level}/"
        attends = level == last and "decoder" in options.attention
        rules += _level(there, here, changes, attends, names, bias)
        if level:
            rules += conv(f"{there}{names.upsample}", f"{here}up")
    return prefixed(official, ours, [conv("conv_in", "conv_in"), rules, _ends(options, names)])


def _levels(options: ConvOptions, num_blocks: int, downwards: bool) -> Iterator[tuple[int, list[bool]]]:
    """Each level in the order in which it runs, and of its blocks whether they change the channels."""
    levels = list(enumerate(options.widths))
    width = options.hidden_channels if downwards else options.widths[-1]
    for level, channels in levels if downwards else reversed(levels):
        yield level, [width != channels, *[False] * (num_blocks - 1)]
        width = channels


def _level(there: str, here: str, changes: list[bool], attends: bool, names: Names, bias: bool) -> list[Rule]:
    rules: list[Rule] = []
    for i, change in enumerate(changes):
        rules += _block(there + names.block.format(i=i), f"{here}block_{i}", change, bias)
        if attends:
            rules += _attention(f"{there}attn.{i}", f"{here}attention_{i}", names.packed)
    return rules


def _ends(options: ConvOptions, names: Names) -> list[Any]:
    """The middle and the last norm and convolution, which encoder and decoder have alike."""
    bias, rules = options.conventions.block_bias, []
    for i in range(options.conventions.middle_blocks or options.num_res_blocks):
        rules += _block(names.middle.format(i=i, number=i + 1, even=2 * i), f"middle/block_{i}", False, bias)
    if "middle" in options.attention:
        rules += _attention(names.middle_attention, "middle/attention_0", names.packed)
    return [rules, norm("norm_out", "norm_out"), conv("conv_out", "conv_out")]


def _block(there: str, here: str, changes: bool, bias: bool) -> list[Rule]:
    rules = [
        *norm(f"{there}.norm1", f"{here}/norm_1"),
        *conv(f"{there}.conv1", f"{here}/conv_1", bias),
        *norm(f"{there}.norm2", f"{here}/norm_2"),
        *conv(f"{there}.conv2", f"{here}/conv_2", bias),
    ]
    return [*rules, *conv(f"{there}.nin_shortcut", f"{here}/shortcut", bias)] if changes else rules


def _attention(there: str, here: str, packed: bool) -> list[Rule]:
    ours = {"q": f"{here}/query", "k": f"{here}/key", "v": f"{here}/value"}
    if packed:
        reads = packed_linear(f"{there}.qkv", list(ours.values()), layout=POINTWISE)
    else:
        reads = [rule for name, leaf in ours.items() for rule in linear(f"{there}.{name}", leaf, layout=POINTWISE)]
    return [
        *norm(f"{there}.norm", f"{here}/norm"),
        *reads,
        *linear(f"{there}.proj_out", f"{here}/out", layout=POINTWISE),
    ]


def tokenizer_of(meta: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The `config.tokenizer` of an official tokenizer.

    Args:
      meta: `config`, the official sizes by their official names.
      weights: by official names; they tell the sizes that the config leaves out.
    """
    sizes = meta["config"]
    if "num_latent_tokens" in sizes:
        return _titok_config(sizes, weights)
    if "patch_nums" in sizes:
        return _var_config(sizes)
    quantizer = dict(kind="vq", vocab_size=sizes["codebook_size"], channels=sizes["codebook_embed_dim"])
    quantizer |= dict(l2_norm=sizes["codebook_l2_norm"], entropy_weight=sizes["entropy_loss_ratio"])
    return {"kind": "autoencoder", "quantizer": quantizer, "z_channels": sizes["z_channels"]} | _conv_config(sizes)


def _conv_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    ours = {"hidden_channels": "ch", "channel_multipliers": "ch_mult", "num_res_blocks": "num_res_blocks"}
    return {here: sizes[there] for here, there in ours.items()}


def _var_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    quantizer = dict(kind="multi_scale_vq", vocab_size=sizes["vocab_size"], channels=sizes["z_channels"])
    quantizer |= dict(patch_nums=sizes["patch_nums"], num_phi=sizes["share_quant_resi"])
    return {"kind": "autoencoder", "quantizer": quantizer, "quant_kernel_size": 3} | _conv_config(sizes)


def _titok_config(sizes: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    transformer = dict(embed_dim=sizes["width"], num_layers=sizes["num_layers"], num_heads=sizes["num_heads"])
    quantizer = dict(vocab_size=sizes["codebook_size"], channels=sizes["token_size"], l2_norm=sizes["use_l2_norm"])
    config: dict[str, Any] = dict(kind="titok", quantizer=dict(kind="vq", **quantizer))
    config |= dict(num_latent_tokens=sizes["num_latent_tokens"], patch_size=sizes["patch_size"])
    config |= dict(encoder=transformer, decoder=transformer)
    if "pixel_quantize.embedding.weight" not in weights:
        return config
    num_proxies, proxy_channels = weights["pixel_quantize.embedding.weight"].shape
    multipliers = sizes["pixel_channel_mult"]
    config["pixel_decoder"] = dict(
        num_proxies=num_proxies,
        proxy_channels=proxy_channels,
        channel_multipliers=multipliers,
        hidden_channels=len(weights["pixel_decoder.norm_out.weight"]) // multipliers[0],
        num_res_blocks=sum(key.startswith("pixel_decoder.mid.") and key.endswith("conv1.weight") for key in weights),
    )
    return config
