"""Official runs of Mamba and Mamba-2: the blocks, their states, and the scans inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, one_by_one, params_of, tokens_of, whole
from ar_jax.interop.rules import Layout, Rule, linear, norm, packed_linear, same
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.kernels.selective_scan import selective_scan
from ar_jax.mixers import MIXERS
from ar_jax.mixers.common.memory import Remembered
from ar_jax.mixers.mamba2 import Mamba2

# [channels, 1, width], the latest token's tap last <-> [width, channels], the latest token's first
FILTERS = Layout(lambda w: w[:, 0, ::-1].T, lambda w: w.T[:, None, ::-1])


def _convolution(official: str, ours: str, bias: bool) -> list[Rule]:
    return [
        same(f"{official}.weight", f"{ours}/filters", layout=FILTERS),
        *([same(f"{official}.bias", f"{ours}/offset")] if bias else []),
    ]


def mamba_rules(mixer: Any) -> list[Any]:
    """The weights of `Mamba` beside those of our mixer."""
    return [
        packed_linear("in_proj", ["fed", "gate"], bias=mixer.use_bias),
        _convolution("conv1d", "convolution", mixer.conv_bias),
        packed_linear("x_proj", ["step_down", "write", "read"], bias=False),
        linear("dt_proj", "step_up"),
        same("A_log", "log_rate"),
        same("D", "skip"),
        linear("out_proj", "out", bias=mixer.use_bias),
    ]


def mamba2_rules(mixer: Mamba2) -> list[Any]:
    """The weights of `Mamba2` beside those of our mixer."""
    spare = mixer.channels < int(mixer.expand * mixer.embed_dim)
    inputs = [*(["mlp_gate", "mlp"] if spare else []), "gate", "fed", "step"]
    return [
        packed_linear("in_proj", inputs, bias=mixer.use_bias),
        _convolution("conv1d", "convolution", mixer.conv_bias),
        same("dt_bias", "step_bias"),
        same("A_log", "log_rate"),
        same("D", "skip"),
        norm("norm", "gated_norm", bias=False) if mixer.norm else [],
        linear("out_proj", "out", bias=mixer.use_bias),
    ]


# Our fields by the names of the official arguments.
FIELDS = {
    "d_model": "embed_dim",
    "d_state": "state_dim",
    "d_conv": "width",
    "expand": "expand",
    "conv_bias": "conv_bias",
}
FIELDS |= {"bias": "use_bias", "headdim": "head_dim", "ngroups": "num_groups", "d_ssm": "ssm_dim", "rmsnorm": "norm"}
FIELDS |= {"norm_before_gate": "norm_first", "D_has_hdim": "skip_per_channel", "dt_limit": "step_limits"}


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our mixer from official arguments; those that only tell how weights start are left out."""
    found = {ours: config[official] for official, ours in FIELDS.items() if official in config}
    rank = config.get("dt_rank", "auto")
    return found | ({} if rank == "auto" else {"step_rank": rank})


def _states(mixer: Any, variables: Any, x: Array) -> tuple[Array, Array]:
    """The last inputs of the convolution, [B, C, width] with zeros in front of the first, and the memory."""
    fed = mixer.apply(variables, x, method=lambda m, x: m.fed(x))
    recent = jnp.pad(fed, ((0, 0), (max(mixer.width - fed.shape[1], 0), 0), (0, 0)))[:, -mixer.width :]

    def read(variables: Any, x: Array) -> Remembered:
        return mixer.apply(variables, x, tokens_of(x.shape[1]), mixer.init_state(len(x), 0, 1))[1]

    memory = jax.jit(read)(variables, x).memory
    return jnp.swapaxes(recent, 1, 2), jnp.swapaxes(memory, 2, 3) if memory.ndim == 4 else memory


def _replay(meta: Meta, weights: Arrays, inputs: Arrays, kind: str, rules: Any) -> Outputs:
    config, x = meta["config"], jnp.asarray(inputs["in.x"])
    mixer = MIXERS[kind](**fields_of(config))
    variables = params_of(mixer, rules(mixer), weights, x, tokens_of(x.shape[1]))
    outputs = {"out.y": whole(mixer, variables, x)}
    if "out.y_step" in meta["outputs"]:
        # The official step does not keep to the limits of step sizes.
        stepped = mixer.clone(step_limits=None) if kind == "mamba2" else mixer
        outputs["out.y_step"] = one_by_one(stepped, variables, x)
        outputs["out.conv_state"], outputs["out.ssm_state"] = _states(stepped, variables, x)
    if "out.conv_state_prefill" in meta["outputs"]:
        half = _states(mixer, variables, x[:, : x.shape[1] // 2])
        outputs["out.conv_state_prefill"], outputs["out.ssm_state_prefill"] = half
    return outputs


def replay_mamba(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The block, whole and token by token, and its state in the middle and at the end."""
    return _replay(meta, weights, inputs, "mamba", mamba_rules)


def replay_mamba2(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The block, whole and token by token, and its state at the end."""
    return _replay(meta, weights, inputs, "mamba2", mamba2_rules)


def replay_scan(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The scan with a gate, without skip, with groups, and with b and c that are the same for all tokens, these without a gate."""
    given = {name.removeprefix("in."): jnp.asarray(array) for name, array in inputs.items()}
    # [B, C, T] to [B, T, C], [B, G, S, T] to [B, T, G, S]
    by_token = {name: jnp.moveaxis(given[name], -1, 1) for name in ("u", "delta", "z", "B", "C", "Bg", "Cg")}
    delta = jax.nn.softplus(by_token["delta"] + given["delta_bias"][None, None])
    fixed = tuple(
        jnp.broadcast_to(given[name][None, None], (*delta.shape[:2], *given[name].shape)) for name in ("B0", "C0")
    )

    @jax.jit
    def scan(b: Array, c: Array, skip: Array | None) -> tuple[Array, Array]:
        return selective_scan(by_token["u"], delta, given["A"], b, c, skip=skip)

    y, last = scan(by_token["B"], by_token["C"], given["D"])
    found = {
        "out.y": y * jax.nn.silu(by_token["z"]),
        "out.y_noD_noz": scan(by_token["B"], by_token["C"], None)[0],
        "out.y_groups": scan(by_token["Bg"], by_token["Cg"], given["D"])[0],
        "out.y_fixed_BC": scan(*fixed, given["D"])[0],
    }
    return {name: jnp.swapaxes(out, 1, 2) for name, out in found.items()} | {"out.last_state": last}


def replay_duality(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Mamba-2's scan as linear attention, from nothing and from a given state."""
    values, log_decay, b, c, start = (jnp.asarray(inputs[f"in.{name}"]) for name in ("X", "A", "B", "C", "h0"))

    @jax.jit
    def scan(start: Array | None) -> tuple[Array, Array]:
        y, state = linear_attention(c, b, values, log_decay=log_decay, initial_state=start)
        return y, jnp.swapaxes(state, 2, 3)

    outputs = dict(zip(("out.y", "out.final_state"), scan(None), strict=True))
    return outputs | dict(zip(("out.y_h0", "out.final_state_h0"), scan(jnp.swapaxes(start[:, 0], 2, 3)), strict=True))
