"""MAR (S066, arXiv:2406.11838): the official weights' names beside ours, and replays of official runs."""

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
from ar_jax.interop.rules import Rule, join, linear, norm, packed_linear, prefixed, same, stacked
from ar_jax.mixers.protocol import take
from ar_jax.models.generator import Context
from ar_jax.system import System


def head_rules(depth: int, official: str = "diffloss.net.", ours: str = "generator/head/network/") -> list[Rule]:
    """The diffusion head, `ar_jax.heads.diffusion.Diffusion`; others that train MAR's diffusion loss have it, too.

    Args:
      depth: residual blocks.
      official: the prefix of the official names.
      ours: the prefix of our leaves.
    """
    block = [
        norm("res_blocks.{i}.in_ln", "blocks/norm"),
        linear("res_blocks.{i}.mlp.0", "blocks/up"),
        linear("res_blocks.{i}.mlp.2", "blocks/down"),
        linear("res_blocks.{i}.adaLN_modulation.1", "blocks/modulation"),
    ]
    rules = [
        linear("time_embed.mlp.0", "time_in"),
        linear("time_embed.mlp.2", "time_out"),
        linear("cond_embed", "condition"),
        linear("input_proj", "input"),
        stacked(depth, block),
        linear("final_layer.adaLN_modulation.1", "modulation"),
        linear("final_layer.linear", "output"),
    ]
    return prefixed(official, ours, rules)


def rules(system: System) -> list[Any]:
    """The network's weights with its head's."""
    generator = system.model.generator
    backbone, classes = generator.decoder, generator.condition.num_classes
    return prefixed(
        "",
        "generator/",
        [
            join({"class_emb.weight": classes, "fake_latent": 1}, "condition/embed/embedding"),
            linear("z_proj", "value_embed"),
            norm("z_proj_ln", "norm"),
            same(
                "encoder_pos_embed_learned",
                "position_embed/embedding",
                shape=(1, backbone.num_rows, backbone.embed_dim),
            ),
            stacked(backbone.num_layers, _block("encoder_blocks.{i}", "decoder/encoder/layers/block_0")),
            norm("encoder_norm", "decoder/encoder_norm"),
            linear("decoder_embed", "decoder/bridge"),
            same("mask_token", "decoder/mask"),
            same("decoder_pos_embed_learned", "decoder/positions"),
            stacked(
                backbone.decoder_layers or backbone.num_layers,
                _block("decoder_blocks.{i}", "decoder/decoder/layers/block_0"),
            ),
            norm("decoder_norm", "decoder/decoder_norm"),
            same("diffusion_pos_embed_learned", "decoder/answer_positions"),
            head_rules(generator.head.depth, ours="head/network/"),
        ],
    )


def _block(there: str, here: str) -> list[Any]:
    """A block of timm's ViT."""
    return [
        norm(f"{there}.norm1", f"{here}/mixer_norm"),
        packed_linear(f"{there}.attn.qkv", [f"{here}/mixer/{name}" for name in ("query", "key", "value")]),
        linear(f"{there}.attn.proj", f"{here}/mixer/out"),
        norm(f"{there}.norm2", f"{here}/mlp_norm"),
        mlp(f"{there}.mlp", f"{here}/mlp", ("fc1", "fc2"), linear),
    ]


def model_config(
    dim: int, num_layers: int, num_heads: int, decoder: tuple[int, int, int] | None = None, mlp_ratio: float = 4.0
) -> dict[str, Any]:
    """`config.model` of MAR: two ViTs; `decoder` are the sizes of the second one, None takes the same."""
    width, layers, heads = decoder or (dim, num_layers, num_heads)
    mixer = dict(kind="softmax", rope_base=0.0, qkv_bias=True, out_bias=True)
    return dict(
        kind="masked_autoencoder", embed_dim=dim, num_layers=num_layers, decoder_dim=width, decoder_layers=layers,
        mlp_dim=int(mlp_ratio * dim), decoder_mlp_dim=int(mlp_ratio * width), norm="layer", activation="gelu_exact",
        gated=False, mlp_bias=True, prefix_positions=True, target_positions=False, embed_norm=True,
        mixer=mixer | {"num_heads": num_heads}, decoder_mixer=mixer | {"num_heads": heads},
    )  # fmt: skip


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    given = meta["config"]
    side = given["img_size"] // given["vae_stride"] // given["patch_size"]
    encoder, decoder = (
        (given[f"{part}_embed_dim"], given[f"{part}_depth"], given[f"{part}_num_heads"])
        for part in ("encoder", "decoder")
    )
    head = dict(kind="diffusion", depth=given["diffloss_d"], width=given["diffloss_w"])
    return dict(
        tokenizer=dict(kind="codes", grids=((side, side),), channels=given["vae_embed_dim"] * given["patch_size"] ** 2),
        order=dict(kind="random", num_steps=given["num_iter"]),
        objective=dict(kind="masked", schedule="truncated_normal", least_masked=0.7),
        condition=dict(kind="class", copies=given["buffer_size"]),
        head=head
        | {"num_sampling_steps": int(given["num_sampling_steps"]), "batch_multiplier": given["diffusion_batch_mul"]},
        model=model_config(*encoder, decoder, given.get("mlp_ratio", 4.0)),
    )


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Encoder, decoder and loss under one mask; the head alone; generation from recorded noise."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    system, params = official_run(_config(meta), given["class_num"], rules, weights)
    tokens = patchified(inputs["in.latents"], given["patch_size"])
    told = functools.partial(hidden_under_mask, system, params, tokens, inputs["in.mask"], labels)
    z, encoded = told()
    net = system.model.ask(params, "__call__", *(jnp.asarray(inputs[f"in.net_{name}"]) for name in "cxt"))
    many = (given["diffusion_batch_mul"], *tokens.shape[:2])
    step = jnp.asarray(inputs["in.t"], jnp.int32).reshape(many)
    noise = jnp.asarray(inputs["in.loss_noise"]).reshape(*many, -1)
    squared, bits = system.model.ask(params, "terms", z, tokens, step, noise)
    mask = jnp.asarray(inputs["in.mask"])[None]
    run = functools.partial(_sampled, system, params, labels, inputs, given["patch_size"])
    scale = given["cfg_scale"]
    return {
        "out.encoder": encoded,
        "out.z": z,
        "out.z_uncond": told(drop=True)[0],
        "out.net": net,
        "out.loss": ((squared + bits) * mask).sum() / (mask.sum() * many[0]),
        "out.loss_mse": squared.reshape(-1),
        "out.loss_vb": bits.reshape(-1),
        "out.sample": run(),
        "out.sample_cfg": run(guidance_scale=scale, guidance_schedule="linear_mar", temperature=given["temperature"]),
        "out.sample_cfg_constant": run(guidance_scale=scale),
    }


def patchified(latents: np.ndarray, size: int) -> Array:
    """Latents [B, C, H, W] as tokens [B, L, C size size]."""
    batch, channels, rows, cols = latents.shape
    patches = latents.reshape(batch, channels, rows // size, size, cols // size, size)
    return jnp.asarray(patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size**2))


def unpatchified(tokens: Array, like: tuple[int, ...], size: int) -> Array:
    """The inverse of `patchified`, for latents of the shape `like`."""
    batch, channels, rows, cols = like
    patches = tokens.reshape(batch, rows // size, cols // size, channels, size, size)
    return patches.transpose(0, 3, 1, 4, 2, 5).reshape(like)


def hidden_under_mask(
    system: System, params: Any, tokens: Array, mask: np.ndarray, labels: Array, drop: bool = False
) -> tuple[Array, Array]:
    """Hidden vectors [B, L, D] on their slots where mask [B, L] hides tokens, and what the encoder made of the others."""
    slots = jnp.argsort(jnp.asarray(mask), axis=1, stable=True).astype(jnp.int32)  # what is known comes first
    known, batch = int((1 - mask[0]).sum()), len(tokens)
    model = system.model
    chunk = masked_chunk(model.order.length, model.num_prefix, jnp.full(batch, known), known)
    content = take(tokens, jnp.concatenate([jnp.zeros((batch, model.num_prefix), jnp.int32), slots], axis=1))
    (hidden, _), state = model.generator.apply(
        {"params": params["generator"]},
        content,
        Context(slots, labels, jnp.full(batch, drop)),
        chunk,
        capture_intermediates=lambda module, _: module.name == "encoder_norm",
    )
    encoded = state["intermediates"]["decoder"]["encoder_norm"]["__call__"][0]
    return take(hidden[:, model.num_prefix :], jnp.argsort(slots, axis=1)), encoded


def _sampled(system: System, params: Any, labels: Array, inputs: Weights, patch_size: int, **drawing: Any) -> Array:
    """Latents [B, C, H, W] from the recorded noise."""
    start, steps = jnp.asarray(inputs["in.noise_init"]), jnp.asarray(inputs["in.noise_steps"])

    def recorded(step: Any, slots: Array) -> Noise:
        return Recorded({"init": take(start, slots), "step": jax.vmap(lambda one: take(one, slots))(steps)})

    slots = jnp.asarray(inputs["in.orders"][:, ::-1], jnp.int32)  # the official order names the last ones first
    context = Context(slots, labels, jnp.zeros(len(labels), bool))
    told = system.drawing(**drawing)
    tokens = jax.jit(lambda params, context: system.sample_in_order(params, context, recorded, told))(params, context)
    return unpatchified(tokens, inputs["in.latents"].shape, patch_size)
