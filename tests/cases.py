"""One row per registered part: the promises' tests run over these tables, and a test demands that no part lacks a row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax import mixers
from ar_jax.data.protocol import Facts
from ar_jax.system import System, from_config

MIXERS: dict[str, dict[str, Any]] = {
    "softmax": dict(kind="softmax", num_heads=2),
    "softmax grouped, normed, biased": dict(
        kind="softmax", num_heads=4, num_kv_heads=2, qk_norm="rms", bias_distance=2, rope_base=0
    ),
    "softmax multi-query": dict(kind="softmax", num_heads=2, num_kv_heads=1, bias_distance=3),
    "softmax as VAR has it": dict(
        kind="softmax", num_heads=2, rope_base=0, qk_norm="l2", qkv_bias=True, key_bias=False, out_bias=True
    ),
    "softmax as LlamaGen has it": dict(kind="softmax", num_heads=2, prefix_rotation="zero", qk_norm="layer"),
    "softmax, queries that see each other": dict(kind="softmax", num_heads=2, query_peers=True, bias_distance=2),
    "softmax window": dict(kind="softmax", num_heads=2, window=3),
    "softmax, forgetting": dict(kind="softmax", num_heads=4, num_kv_heads=2, forget_gate=True),
    "softmax window, forgetting": dict(kind="softmax", num_heads=2, window=3, forget_gate=True),
    "linear": dict(kind="linear", num_heads=2),
    "linear, fixed decay": dict(
        kind="linear", num_heads=2, feature_map="identity", decay="fixed", normalize=False, chunk_size=4
    ),
    "linear, learned decay": dict(kind="linear", num_heads=2, feature_map="relu", decay="learned", normalize=False),
    "linear, retention": dict(
        kind="linear",
        num_heads=2,
        value_dim=6,
        feature_map="identity",
        decay="fixed",
        normalize=False,
        rope_base=10000.0,
        out_norm="plain",
        out_gate="silu",
    ),
    "linear, gated": dict(
        kind="linear",
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        value_dim=3,
        feature_map="identity",
        decay="channel",
        decay_rank=3,
        normalize=False,
        out_gate="silu",
        short_width=3,
    ),
    "linear, HGRN2": dict(
        kind="linear",
        num_heads=2,
        head_dim=3,
        value_dim=8,
        feature_map="silu",
        decay="channel",
        decay_rank=0,
        decay_divisor=1.0,
        decay_floor=0.2,
        tied_keys=True,
        normalize=False,
        norm_heads=False,
    ),
    "linear, slopes": dict(kind="linear", num_heads=2, feature_map="silu", decay="slopes", depth=0.5, normalize=False),
    "linear, FAST": dict(kind="linear", num_heads=2, head_dim=3, feature_map="taylor", qk_norm="plain"),
    "linear, ReBased": dict(
        kind="linear", num_heads=2, head_dim=3, feature_map="square", qk_norm="layer", epsilon=1e-6
    ),
    "linear, log-normal, blocks": dict(kind="linear", num_heads=2, feature_map="exp", epsilon=1e-8, block_size=3),
    "linear, both ways": dict(kind="linear", num_heads=2, epsilon=1e-6, qkv_bias=True, out_bias=True, causal=False),
    "convolution": dict(kind="convolution", width=3),
    "convolution, one tap": dict(kind="convolution", width=1),
    "fnet": dict(kind="fnet", num_samples=3, stride=2),
    "fnet, whole": dict(kind="fnet", causal=False, unitary=True),
    "aft": dict(kind="aft"),
    "aft, full": dict(kind="aft", variant="full", hidden_dim=12),
    "aft, full, low rank, whole": dict(kind="aft", variant="full", bias_rank=2, causal=False),
    "aft, local": dict(kind="aft", variant="local", window=3),
    "aft, local, whole": dict(kind="aft", variant="local", window=2, causal=False),
    "aft, conv": dict(kind="aft", variant="conv", window=3, num_heads=2, use_bias=True),
    "aft, conv, whole": dict(kind="aft", variant="conv", window=2, num_heads=2, filter_norm=False, causal=False),
    "chela": dict(kind="chela", num_heads=2, z_dim=4, v_dim=6, short_width=2, long_width=4, chunk_size=4),
    "gss": dict(kind="gss", state_dim=3, dss_dim=5, gate_dim=8),
    "mega": dict(kind="mega", z_dim=4, v_dim=6, ema_dim=2),
    "mega, chunks, laplace, rotary": dict(
        kind="mega", z_dim=4, v_dim=6, ema_dim=2, attention="laplace", chunk_size=3, bias="rotary", norm="layer"
    ),
    "mega, both ways": dict(kind="mega", z_dim=4, v_dim=6, ema_dim=2, attention="relu2", causal=False, truncation=3),
    "mega, both ways, chunks": dict(kind="mega", z_dim=4, v_dim=6, ema_dim=2, chunk_size=4, causal=False),
    "hrrformer": dict(kind="hrrformer", num_heads=2),
    "transformer_xl": dict(kind="transformer_xl", num_heads=2, segment_length=3, memory_length=2),
    "transformer_xl, blocks": dict(kind="transformer_xl", num_heads=2, segment_length=4, memory_length=0),
    "linformer": dict(kind="linformer", num_heads=2, rank=3),
    "linformer, per head, multi-query": dict(kind="linformer", num_heads=2, num_kv_heads=1, rank=2, share_heads=False),
    "linformer, shared values": dict(kind="linformer", num_heads=2, rank=2, share_values=True),
    "lightweight_convolution": dict(kind="lightweight_convolution", num_heads=2, width=3, bias=True),
    "lightweight_convolution, dynamic": dict(
        kind="lightweight_convolution", num_heads=2, width=3, dynamic=True, in_proj=True, renormalize=True
    ),
    "lightweight_convolution, centred": dict(
        kind="lightweight_convolution", num_heads=2, width=3, causal=False, renormalize=True
    ),
    "lightweight_convolution, dynamic, centred": dict(
        kind="lightweight_convolution", num_heads=2, width=4, causal=False, dynamic=True, filter_bias=True
    ),
    "combiner": dict(kind="combiner", num_heads=2, width=2),
    "combiner, logsparse": dict(kind="combiner", num_heads=2, factorization="logsparse"),
    "combiner, axial": dict(kind="combiner", num_heads=2, factorization="axial", width=3),
    "loki": dict(kind="loki", num_heads=4, num_kv_heads=2, num_keys=3, rank=2),
    "multiresolution": dict(kind="multiresolution", num_heads=2, num_blocks=16, block_size=4),
    "native_sparse": dict(kind="native_sparse", num_heads=4, num_kv_heads=2, block_size=2, num_blocks=3, window=2),
    "routing": dict(kind="routing", num_heads=2, local_heads=1, num_clusters=2, window=3, local_window=2),
    "routing, shared": dict(kind="routing", num_heads=2, local_heads=0, num_clusters=3, window=2, shared=True),
    "routing, both ways": dict(
        kind="routing", num_heads=2, local_heads=1, num_clusters=2, window=9, num_memory=1, causal=False
    ),
    "seer_attention": dict(kind="seer_attention", num_heads=4, num_kv_heads=2, num_blocks=2, block_size=2),
    "seer_attention, by threshold": dict(
        kind="seer_attention", num_heads=2, num_blocks=4, block_size=2, threshold=0.3, groups="average_project"
    ),
    "seer_attention, dense": dict(kind="seer_attention", num_heads=2, block_size=3, gate_norm=True, dense=True),
    "select_and_pack": dict(kind="select_and_pack", num_heads=2),
    "sparsek": dict(kind="sparsek", num_heads=4, num_kv_heads=2, num_keys=2, window=1, position_slope=0.01),
    "sparsek, straight-through": dict(
        kind="sparsek", num_heads=2, num_keys=2, capacity=3, window=2, gates="straight_through", gate_keys=False
    ),
    "subsampled": dict(kind="subsampled", num_heads=4, num_kv_heads=2, window=2, spread=1.0),
    "neighborhood": dict(kind="neighborhood", num_heads=2, kernel_size=2),
    "neighborhood, strided, dilated, biased": dict(
        kind="neighborhood", num_heads=2, kernel_size=2, stride=2, dilation=(1, 2), relative_bias=True
    ),
    "neighborhood, causal axes": dict(kind="neighborhood", num_heads=2, kernel_size=(3, 0), causal_axes=(True, False)),
    "axial": dict(kind="axial", num_heads=2),
    "axial, one after the other": dict(kind="axial", num_heads=2, sum_axes=False),
    "vision_retention": dict(kind="vision_retention", num_heads=2),
    "vision_retention, one dimension": dict(kind="vision_retention", num_heads=2, dimensions=1, chunk_size=4),
    "lightnet": dict(kind="lightnet", num_heads=2, expand_ratio=4),
    "lightnet, turned": dict(
        kind="lightnet", num_heads=2, expand_ratio=3, rotation="cosine", short_width=3, short_bias=True
    ),
    "toeplitz": dict(kind="toeplitz", num_heads=2),
    "lightnet, both ways": dict(kind="lightnet", num_heads=2, expand_ratio=3, rotation="cosine", causal=False),
    "mamba": dict(kind="mamba", state_dim=3, expand=1.5, step_rank=2, use_bias=True),
    "mamba2": dict(kind="mamba2", state_dim=3, head_dim=4, num_groups=2, ssm_dim=24, chunk_size=4),
    "delta": dict(kind="delta", num_heads=2, num_value_heads=4, value_head_dim=6, width=3),
    "delta, without decay": dict(
        kind="delta", num_heads=2, decay="none", gate="none", activation="elu", qk_norm="sum", learn_beta=False, width=0
    ),
    "delta, product": dict(
        kind="delta", num_heads=2, num_writes=2, allow_negative_eigenvalues=True, width=2, conv_bias=True, chunk_size=4
    ),
    "delta, per channel": dict(
        kind="delta", num_heads=2, decay="channel", decay_rank=3, lower_bound=-5.0, gate="sigmoid", gate_rank=4, width=2
    ),
    "rwkv6": dict(kind="rwkv6", num_heads=2, value_head_dim=6, mix_rank=3, decay_rank=4),
    "rwkv7": dict(kind="rwkv7", num_heads=2, value_head_dim=6, decay_rank=3, rate_rank=4, gate_rank=5),
    "hgrn": dict(kind="hgrn", hidden_dim=10, decay_floor=0.2, short_width=3),
    "mesa": dict(kind="mesa", num_heads=2, num_iterations=12, width=2, chunk_size=4),
    "mesa, exact, gated": dict(kind="mesa", num_heads=2, num_iterations=None, gate="silu", conv_bias=True),
    "slots": dict(kind="slots", num_heads=4, num_kv_heads=2, head_dim=3, value_dim=5, num_slots=4, short_width=2),
    "slots, softmax": dict(
        kind="slots",
        num_heads=2,
        num_slots=3,
        write="softmax",
        feature_map="identity",
        value_map="identity",
        query_scale=None,
        rope_base=10000.0,
        out_map="identity",
        norm_heads=True,
        out_gate="silu",
    ),
    "agalite": dict(kind="agalite", num_heads=2, head_dim=3, expansion=2, num_waves=3, chunk_size=4),
    "ttt": dict(kind="ttt", num_heads=2, mini_batch=4),
    "mamba2, log-linear": dict(kind="mamba2", state_dim=4, head_dim=8, num_levels=6, chunk_size=4),
    "hyper_zzw": dict(kind="hyper_zzw", local_widths=(2, 3), hidden_dim=5),
    "conditioned_attention": dict(kind="conditioned_attention", rnn_dim=5, conditioning="none", energy_layers=2),
    "within and across steps": dict(
        kind="softmax : mamba2", softmax=dict(num_heads=2, window=1), mamba2=dict(state_dim=3, head_dim=8)
    ),
    "fixed_point": dict(kind="fixed_point", num_heads=2, max_iterations=8),
    "hybrid": dict(
        kind="linear : convolution : softmax", linear=dict(num_heads=2), softmax=dict(num_heads=2, window=4)
    ),
}
CAUSAL_MIXERS = [n for n, r in MIXERS.items() if r.get("causal", ":" in r["kind"] or mixers.MIXERS[r["kind"]].causal)]
ORDERS: dict[str, dict[str, Any]] = {
    "raster": dict(kind="raster"),
    "column": dict(kind="column"),
    "right_to_left": dict(kind="right_to_left"),
    "diagonal": dict(kind="diagonal"),
    "diagonal, parallel": dict(kind="diagonal", parallel=True),
    "spiral": dict(kind="spiral"),
    "spiral, outward": dict(kind="spiral", outward=True),
    "random": dict(kind="random"),
    "random, in sets": dict(kind="random", num_steps=3),
    "nearest": dict(kind="nearest"),
    "nearest, one by one": dict(kind="nearest", parallel=False, start=1),
    "subsample": dict(kind="subsample"),
    "parallel_groups": dict(kind="parallel_groups", regions=(1, 3)),
    "blocks": dict(kind="blocks"),
    "locality": dict(kind="locality", num_steps=3),
    "next_scale": dict(kind="next_scale"),
    "coarse_to_fine": dict(kind="coarse_to_fine"),
    "patches": dict(kind="patches", patch=(3, 1), over=dict(kind="right_to_left")),
    "one_of": dict(kind="one_of"),
}
FEEDS = ("shift", "query", "resize", "mask", "neighbors", "merge", "recent", "refine", "nearby")
BACKBONES: dict[str, dict[str, Any]] = {
    "decoder": dict(kind="decoder"),
    "decoder, told the step": dict(
        kind="decoder", adaln="block", rank_modulation=True, prefix_positions=True, norm="layer", last_norm="plain"
    ),
    "decoder, two outputs": dict(kind="decoder", branch_layers=(1,)),
    "decoder, drawing between layers": dict(
        kind="decoder", branch_layers=(1, 1), reads_answers=True, merge="sum", num_layers=1
    ),
    "decoder, shuffled tokens": dict(kind="decoder", merge="shuffle", shuffle_blocks=1, embed_dim=12),
    "decoder, told the direction": dict(
        kind="decoder", adaln="block", target_axes=True, direction_modulation=True, codebook_inputs=True
    ),
    "decoder, post-norm": dict(kind="decoder", norm="layer", norm_first=False, embed_norm=True, common=True),
    "decoder, MLP in every other layer": dict(kind="decoder", mlps="last", adaln="block"),
    "decoder, no MLPs, grouped adaLN": dict(
        kind="decoder", mlps="none", adaln="shared", adaln_groups=2, num_layers=3, last_norm="rms_twice"
    ),
    "two_pass": dict(kind="two_pass"),
    "masked_autoencoder": dict(kind="masked_autoencoder", decoder_dim=12, decoder_mlp_dim=20, prefix_positions=True),
    "axial_transformer": dict(kind="axial_transformer", outer_layers=1),
    "axial_transformer, three axes": dict(kind="axial_transformer", outer_layers=1, slice_shape=(2, 2)),
    "block_transformer": dict(kind="block_transformer", decoder_dim=12, decoder_layers=1),
    "block_transformer, summation": dict(
        kind="block_transformer", strategy="summation", block_length=2, decoder_layers=1, side_by_side=True
    ),
    "block_transformer, cross-attention": dict(
        kind="block_transformer", strategy="cross_attention", expansion=3, decoder_dim=12, decoder_layers=1
    ),
    "perceiver_ar": dict(kind="perceiver_ar", num_latents=4, decoder_dim=12, cross_after=(0, 1)),
    "perceiver_ar, side by side": dict(
        kind="perceiver_ar", num_latents=3, latents_per_token=2, query="learned", query_layers=1, query_offset=1
    ),
    "perceiver_ar, own keys": dict(
        kind="perceiver_ar", num_latents=3, query="identity", own_keys=True, final_norm=False
    ),
    "u_vit": dict(kind="u_vit", activation="gelu_exact", gated=False, mlp_bias=True),
}


@functools.cache
def tiny(
    mixer: str = "softmax",
    order: str = "raster",
    feed: str = "auto",
    backbone: str = "decoder",
    side: int = 3,
    levels: int = 3,
    **changes: Any,
) -> System:
    """A system of a few thousand parameters on side x side images of so many grey levels and 3 classes.

    `changes` are further keys of the config, as "section.key" or "section".
    """
    pyramid = ORDERS[order]["kind"] == "next_scale"
    num_layers = max(2, len(MIXERS[mixer]["kind"].split(":")))
    config: dict[str, Any] = {
        "tokenizer": {"kind": "pixel_pyramid", "sides": (1, 2, 3)[:side] if side < 4 else (1, 2, side)}
        if pyramid
        else {"kind": "pixels"},
        "order": ORDERS[order],
        "feed": {"kind": feed},
        "condition": {"kind": "class"},
        "model": {"num_layers": num_layers, "embed_dim": 16}
        | BACKBONES[backbone]
        | {"mixer": MIXERS[mixer], "mlp_dim": 24},
        "objective": {"kind": "masked" if feed == "mask" else "next_token"},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        config[section] = (config.get(section, {}) | {key: value}) if key else value
    facts = Facts("image", (side, side, 1), levels, ("a", "b", "c"))
    return from_config(config, facts)


@functools.cache
def tiny_params(system: System) -> Any:
    """Parameters that are all away from zero, so that every path carries a signal."""
    return away_from_zero(jax.eval_shape(system.init, jax.random.key(0)))


def away_from_zero(shapes: Any, seed: int = 1) -> Any:
    """Arrays of these shapes, normal with the variance that a product by them keeps; drawn without a compiler."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        fan = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * fan**-0.5, leaf.dtype)

    return jax.tree.map(draw, shapes)


def tokens(system: System, batch_size: int, seed: int = 0) -> jax.Array:
    """Random discrete tokens on all slots, [B, L]."""
    return jax.random.randint(
        jax.random.key(seed), (batch_size, system.model.order.length), 0, system.tokenizer.vocab_size, jnp.int32
    )
