"""Official runs of vision backbones and their parts: VAN, MambaOut, ULSAM, HaloNet. Official grids are [B, C, H, W]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.rules import (
    POINTWISE,
    Rule,
    Rules,
    conv,
    each,
    linear,
    norm,
    packed_linear,
    prefixed,
    same,
    unused,
)
from ar_jax.interop.transfer import to_ours
from ar_jax.models.vision.gated_cnn import GatedCnnBlock, mamba_out
from ar_jax.models.vision.halo import HaloAttention
from ar_jax.models.vision.large_kernel import LargeKernel, LargeKernelAttention, VanBlock, van
from ar_jax.models.vision.subspace import SubspaceAttention

Outputs = dict[str, Any]


def channels_last(x: Any) -> Array:
    """[B, C, H, W] to [B, H, W, C]."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def channels_first(x: Array) -> Array:
    """[B, H, W, C] to [B, C, H, W]."""
    return jnp.moveaxis(x, -1, 1)


def run(module: Any, rules: Rules, weights: Arrays, x: Array, method: str = "__call__") -> Any:
    """What a module gives for x with official weights; the rules' names of ours begin with "params" or "batch_stats"."""
    like = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    variables = jax.tree.map(jnp.asarray, to_ours(rules, weights, like).params)
    return jax.jit(lambda variables, x: module.apply(variables, x, method=method))(variables, x)


def batch_norm(official: str, ours: str) -> Rules:
    """A batch norm: its scale and bias, and the moments that it keeps."""
    moments = {"running_mean": "mean", "running_var": "var"}
    return [
        norm(official, f"params/{ours}"),
        [same(f"{official}.{there}", f"batch_stats/{ours}/{here}") for there, here in moments.items()],
        unused(f"{official}.num_batches_tracked", required=False),
    ]


def _point(official: str, ours: str) -> Rules:
    return linear(official, ours, layout=POINTWISE)


def _large_kernel(official: str, ours: str) -> Rules:
    return [
        conv(f"{official}.conv0", f"{ours}near"),
        conv(f"{official}.conv_spatial", f"{ours}far"),
        _point(f"{official}.conv1", f"{ours}point"),
    ]


def _large_kernel_attention(official: str, ours: str) -> Rules:
    return [
        _point(f"{official}.proj_1", f"{ours}up"),
        _point(f"{official}.proj_2", f"{ours}down"),
        _large_kernel(f"{official}.spatial_gating_unit", f"{ours}gate/"),
    ]


def _van_block(official: str, ours: str) -> Rules:
    return [
        batch_norm(f"{official}norm1", f"{ours}attention_norm"),
        batch_norm(f"{official}norm2", f"{ours}mlp_norm"),
        _large_kernel_attention(f"{official}attn", f"params/{ours}attention/"),
        [same(f"{official}layer_scale_{i}", f"params/{ours}scale_{i}") for i in (1, 2)],
        _point(f"{official}mlp.fc1", f"params/{ours}mlp/up"),
        conv(f"{official}mlp.dwconv.dwconv", f"params/{ours}mlp/conv"),
        _point(f"{official}mlp.fc2", f"params/{ours}mlp/down"),
    ]


def replay_van_block(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """A block, and its attention and its gate by themselves."""
    x = channels_last(inputs["in.x"])

    def below(prefix: str) -> dict[str, np.ndarray]:
        return {name: array for name, array in weights.items() if name.startswith(prefix)}

    gate = _large_kernel("attn.spatial_gating_unit", "params/")
    found = {
        "out.lka": run(LargeKernel(), gate, below("attn.spatial_gating_unit."), x),
        "out.attention": run(LargeKernelAttention(), _large_kernel_attention("attn", "params/"), below("attn."), x),
        "out.y": run(VanBlock(meta["config"]["mlp_ratio"]), _van_block("", ""), weights, x),
    }
    return {name: channels_first(y) for name, y in found.items()}


def replay_van_model(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The classifier."""
    config = meta["config"]
    depths = config["depths"]
    sizes = {key: tuple(config[key]) for key in ("embed_dims", "depths", "mlp_ratios")}
    model = van(**sizes, num_classes=config["num_classes"])
    stages = [
        [
            conv(f"patch_embed{i + 1}.proj", f"params/backbone/patch_{i}/conv"),
            batch_norm(f"patch_embed{i + 1}.norm", f"backbone/patch_{i}/norm"),
            [_van_block(f"block{i + 1}.{j}.", f"backbone/block_{i}_{j}/") for j in range(depth)],
            norm(f"norm{i + 1}", f"params/backbone/norm_{i}"),
        ]
        for i, depth in enumerate(depths)
    ]
    rules = [stages, linear("head", "params/head")]
    return {"out.logits": run(model, rules, weights, channels_last(inputs["in.image"]))}


def _gated_cnn(official: str, ours: str) -> Rules:
    names = {"fc1": "up", "fc2": "down"}
    return [
        norm(f"{official}norm", f"{ours}norm"),
        conv(f"{official}conv", f"{ours}conv"),
        [linear(f"{official}{there}", f"{ours}{here}") for there, here in names.items()],
    ]


def replay_mambaout_block(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """A gated convolution; its grids are [B, H, W, C]."""
    config = meta["config"]
    block = GatedCnnBlock(config["expansion_ratio"], config["conv_ratio"], config["kernel_size"])
    return {"out.y": run(block, _gated_cnn("", "params/"), weights, jnp.asarray(inputs["in.x"]))}


def replay_mambaout_model(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The classifier, and the features before its head."""
    config = meta["config"]
    options = {key: config[key] for key in ("kernel_size", "conv_ratio") if key in config}
    model = mamba_out(tuple(config["dims"]), tuple(config["depths"]), config["num_classes"], **options)
    last = len(config["dims"])
    down = [conv("downsample_layers.{i}.conv", "backbone/patch_{i}/conv")]
    down += [norm("downsample_layers.{i}.norm", "backbone/patch_{i}/norm")]
    stem = [
        [
            conv(f"downsample_layers.0.conv{i}", f"backbone/patch_0/{name}/conv"),
            norm(f"downsample_layers.0.norm{i}", f"backbone/patch_0/{name}/norm"),
        ]
        for i, name in ((1, "first"), (2, "second"))
    ]
    blocks = [
        _gated_cnn(f"stages.{i}.{j}.", f"backbone/block_{i}_{j}/")
        for i, depth in enumerate(config["depths"])
        for j in range(depth)
    ]
    head = [linear("head.fc1", "head/up"), norm("head.norm", "head/norm"), linear("head.fc2", "head/down")]
    rules = prefixed("", "params/", [stem, each(range(1, last), down), blocks, norm("norm", "norm"), head])
    image = channels_last(inputs["in.image"])
    return {
        "out.logits": run(model, rules, weights, image),
        "out.features": run(model, rules, weights, image, "features"),
    }


def joined(official: Sequence[str], ours: str, shape: tuple[int, ...]) -> Rule:
    """Arrays of one shape, one below the other, are one leaf."""
    return Rule(
        tuple(official),
        (ours,),
        lambda arrays, shapes: [np.concatenate(arrays).reshape(shapes[0])],
        lambda leaves, kept: [part.reshape(shape) for part in np.split(leaves[0], len(official))],
    )


def replay_ulsam(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The module; its groups of channels are modules of their own there."""
    config = meta["config"]
    groups, size = config["num_splits"], config["nin"] // config["num_splits"]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "conv_dws.weight": ("params/scale", (size, 1, 1, 1)),
        "conv_dws.bias": ("params/shift", (size,)),
        "conv_point.weight": ("params/weight", (1, size, 1, 1)),
        "conv_point.bias": ("params/bias", (1,)),
    }
    for there, here, width in (("bn_dws", "channel_norm", size), ("bn_point", "map_norm", 1)):
        shapes |= {f"{there}.weight": (f"params/{here}/scale", (width,))}
        shapes |= {f"{there}.bias": (f"params/{here}/bias", (width,))}
        shapes |= {f"{there}.running_mean": (f"batch_stats/{here}/mean", (width,))}
        shapes |= {f"{there}.running_var": (f"batch_stats/{here}/var", (width,))}
    rules = [
        joined([f"subspaces.{i}.{name}" for i in range(groups)], ours, shape) for name, (ours, shape) in shapes.items()
    ]
    counters = [f"subspaces.{i}.{bn}.num_batches_tracked" for i in range(groups) for bn in ("bn_dws", "bn_point")]
    y = run(
        SubspaceAttention(groups), [rules, unused(*counters, required=False)], weights, channels_last(inputs["in.x"])
    )
    return {"out.y": channels_first(y)}


def replay_halo(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """halonet-pytorch's module, with its mask as meant and as published."""
    config = meta["config"]
    names = {"block_size": "block_size", "halo_size": "halo_size", "heads": "num_heads", "dim_head": "head_dim"}
    sizes = {ours: config[there] for there, ours in names.items()}
    rules = [
        linear("to_q", "params/query", bias=False),
        packed_linear("to_kv", ["params/key", "params/value"], bias=False),
        linear("to_out", "params/out"),
        same("rel_pos_emb.rel_height", "params/rows"),
        same("rel_pos_emb.rel_width", "params/columns"),
    ]
    x = channels_last(inputs["in.x"])
    found = {"out.y": "masked", "out.y_as_published": "inverted"}
    return {
        name: channels_first(run(HaloAttention(**sizes, padding=padding), rules, weights, x))
        for name, padding in found.items()
    }


def replay_halo_timm(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """timm's module, with strides; its keys and values are packed head by head."""
    config = meta["config"]
    heads, bias = config["num_heads"], "q.bias" in weights
    inner = len(weights["q.weight"])  # of queries, and of keys
    head_dim, out_dim = inner // heads, len(weights["kv.weight"]) - inner
    module = HaloAttention(
        config["block_size"],
        config["halo_size"],
        heads,
        head_dim,
        out_dim,
        stride=config["stride"],
        pool=config["avg_down"],
        scale_positions=config["scale_pos_embed"],
        project=False,
        padding="read",
        qkv_bias=bias,
    )
    rules = [
        linear("q", "params/query", bias=bias, layout=POINTWISE),
        _keys_and_values("kv.weight", "params/key/kernel", "params/value/kernel", heads),
        [_keys_and_values("kv.bias", "params/key/bias", "params/value/bias", heads)] if bias else [],
        same("pos_embed.height_rel", "params/rows"),
        same("pos_embed.width_rel", "params/columns"),
    ]
    return {"out.y": channels_first(run(module, rules, weights, channels_last(inputs["in.x"])))}


def _keys_and_values(official: str, key: str, value: str, heads: int) -> Rule:
    """[heads (H + E), D, 1, 1], in each head keys before values, is our [D, heads H] and [D, heads E]; biases likewise."""

    def read(arrays: Any, shapes: Any) -> Any:
        packed = arrays[0].reshape(heads, len(arrays[0]) // heads, -1)  # [N, H + E, D], a bias with D = 1
        parts = np.split(packed, [shapes[0][-1] // heads], axis=1)
        return [np.moveaxis(part, -1, 0).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def write(leaves: Any, kept: Any) -> Any:
        parts = [np.moveaxis(leaf.reshape(-1, heads, leaf.shape[-1] // heads), 0, -1) for leaf in leaves]
        packed = np.concatenate(parts, axis=1)
        return [packed.reshape(-1) if leaves[0].ndim == 1 else packed.reshape(-1, packed.shape[-1], 1, 1)]

    return Rule((official,), (key, value), read, write)
