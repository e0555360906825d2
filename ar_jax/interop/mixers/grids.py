"""Official runs of attention on grids: neighbourhood attention (NATTEN), axial attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.rules import Layout, Rules, conv, linear, norm, packed_linear, same
from ar_jax.interop.transfer import to_ours
from ar_jax.kernels.neighborhood import Neighborhood, neighborhood_attention
from ar_jax.mixers import MIXERS
from ar_jax.models.vision.axial import AxialImageTransformer

Outputs = dict[str, Any]


def run(module: Any, rules: Rules, weights: Arrays, x: Any, method: str = "__call__") -> Any:
    """What a module gives for x with official weights.

    Args:
      module: Linen, with parameters alone.
      rules: of its parameters.
      weights: by official name.
      x: its input.
      method: its method of x.
    """
    x = jnp.asarray(x)
    like = jax.eval_shape(lambda: module.init(jax.random.key(0), x, method=method))["params"]
    params = jax.tree.map(jnp.asarray, to_ours(rules, weights, like).params)
    return jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))(params, x)


def _each_axis(value: Any, count: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * count


def replay_natten(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Neighbourhood attention in one, two and three dimensions, the windows of `config.cases` one after the other."""
    config, found = meta["config"], Outputs()
    grid = tuple(config["shape"])
    q, k, v = (jnp.asarray(inputs[f"in.{name}"]) for name in "qkv")
    for case, windows in enumerate(config["cases"]):
        told = dict(zip(config["case_fields"], windows, strict=True))
        fields = (_each_axis(told[name], len(grid)) for name in ("kernel_size", "stride", "dilation", "is_causal"))
        neighborhood = Neighborhood(grid, *fields)
        y, lse = neighborhood_attention(q, k, v, neighborhood, return_lse=True)
        mask = neighborhood.visible().dense()[0]
        found |= {f"out.y{case}": y, f"out.lse{case}": lse, f"out.mask{case}": mask}
    return found


def replay_natten_module(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The module with its projections."""
    config, x = meta["config"], inputs["in.x"]
    mixer = MIXERS["neighborhood"](
        embed_dim=config["embed_dim"],
        num_heads=config["num_heads"],
        kernel_size=_each_axis(config["kernel_size"], x.ndim - 2),
        stride=_each_axis(config.get("stride", 1), x.ndim - 2),
        dilation=_each_axis(config.get("dilation", 1), x.ndim - 2),
        causal_axes=_each_axis(config.get("is_causal", False), x.ndim - 2),
        grid=x.shape[1:-1],
        qkv_bias="qkv.bias" in weights,
    )
    rules = [packed_linear("qkv", ["query", "key", "value"], bias=mixer.qkv_bias), linear("proj", "out")]
    if config.get("qk_scale"):  # in the queries, beside that of our own
        width = config["embed_dim"]
        more = np.float32(config["qk_scale"] * (width // config["num_heads"]) ** 0.5)
        weights = dict(weights) | {
            name: np.concatenate([w[:width] * more, w[width:]])
            for name, w in weights.items()
            if name.startswith("qkv.")
        }
    return {"out.y": run(mixer, rules, weights, x, "on_grid")}


def _line(official: str, ours: str) -> Rules:
    """Attention along an axis."""
    return [
        linear(f"{official}.to_q", f"{ours}/query", bias=False),
        packed_linear(f"{official}.to_kv", [f"{ours}/key", f"{ours}/value"], bias=False),
        linear(f"{official}.to_out", f"{ours}/out"),
    ]


def replay_axial(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Axial attention in any number of dimensions, the channels anywhere among them."""
    config = meta["config"]
    x = jnp.moveaxis(jnp.asarray(inputs["in.x"]), config["dim_index"], -1)
    mixer = MIXERS["axial"](
        embed_dim=config["dim"],
        num_heads=config["heads"],
        head_dim=config["dim_heads"],
        sum_axes=config["sum_axial_out"],
        grid=x.shape[1:-1],
    )
    rules = [_line(f"axial_attentions.{axis}.fn", f"lines_{axis}") for axis in range(config["num_dimensions"])]
    return {"out.y": jnp.moveaxis(run(mixer, rules, weights, x, "on_grid"), -1, config["dim_index"])}


def replay_axial_image(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The image transformer, reversible or not."""
    config = meta["config"]
    shape = inputs["in.x"].shape[2:]
    model = AxialImageTransformer(config["depth"], config["heads"], config.get("dim_heads"), config["reversible"])
    middle = {False: ("{i}.0", "{i}.1"), True: ("{i}.f.net", "{i}.g.net")}[config["reversible"]]
    rules: list[Rules] = []
    positions = {}  # of zeros, where there are none
    for axis, size in enumerate(shape):
        spread = (1, config["dim"], *(size if other == axis else 1 for other in range(len(shape))))
        rules.append(same(f"pos_emb.param_{axis}", f"position_{axis}", spread, Layout(np.transpose, np.transpose)))
        positions[f"pos_emb.param_{axis}"] = np.zeros(spread, np.float32)
    for depth in range(config["depth"]):
        for half, there in enumerate(middle):
            line, conv_mlp = (f"layers.blocks.{there}".replace("{i}", str(2 * depth + part)) for part in (0, 1))
            ours = f"layer_{depth}_{half}"
            rules += [_line(f"{line}.fn.fn", f"{ours}_line"), norm(f"{line}.fn.norm", f"{ours}_norm")]
            rules += [
                same(f"{conv_mlp}.0.{there}", f"{ours}_mlp/{here}", (1, config["dim"], 1, 1))
                for there, here in (("g", "scale"), ("b", "shift"))
            ]
            rules += [conv(f"{conv_mlp}.1", f"{ours}_mlp/up"), conv(f"{conv_mlp}.3", f"{ours}_mlp/down")]
    x = jnp.moveaxis(jnp.asarray(inputs["in.x"]), 1, -1)
    return {"out.y": jnp.moveaxis(run(model, rules, positions | dict(weights), x), -1, 1)}
