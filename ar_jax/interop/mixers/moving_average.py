"""Official runs of Mega's layer (fairseq)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from ar_jax.config import choose
from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, one_by_one, params_of, tokens_of
from ar_jax.interop.rules import join, linear, packed_linear, same, unused
from ar_jax.mixers import MIXERS
from ar_jax.mixers.norms import make_norm

NORMS = {"layernorm": "layer", "scalenorm": "rms", "rmsnorm": "rms", "batchnorm": "batch", "syncbatchnorm": "batch"}
EPSILON = 1e-5
# The published `delta` is the share of what is new, the paper's alpha, and its `alpha` damps the forgetting.
AVERAGE = {"move.delta": "average/alpha", "move.alpha": "average/delta"} | {
    f"move.{name}": f"average/{name}" for name in ("beta", "gamma", "omega")
}
NORM_NAMES = {"norm.norm.weight": "scale", "norm.norm.bias": "bias"}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    chunk = max(config["chunk_size"], 0)
    norm = choose(NORMS, config["norm_type"], "norm_type")
    return dict(
        embed_dim=config["embed_dim"], z_dim=config["zdim"], v_dim=config["hdim"], ema_dim=config["ndim"],
        truncation=config["truncation"] or 0, attention=config["attn"], chunk_size=chunk,
        causal=not config["bidirectional"], bias=config["rel_pos_bias"], max_positions=chunk or config["max_positions"],
        norm=norm if config["prenorm"] else "none", norm_epsilon=EPSILON,
    )  # fmt: skip


def _rules(weights: Arrays, fields: Mapping[str, Any], own_norm: Iterable[str]) -> list[Any]:
    rotary = {"rel_pos_bias.alpha": 1, "rel_pos_bias.beta": 1}
    # What the average becomes is packed: u, then z and r, then h.
    return [
        [same(there, ours, shape=weights[there].shape) for there, ours in AVERAGE.items()],
        linear("v_proj", "value"),
        packed_linear("mx_proj", ("update", "shared", "gate", "hidden")),
        linear("h_proj", "out"),
        same("gamma", "scales"),
        same("beta", "offsets"),
        join(rotary, "turned") if fields["bias"] == "rotary" else same("rel_pos_bias.rel_pos_bias", "distances"),
        unused("rel_pos_bias._float_tensor", required=False),
        [same(name, name) for name in own_norm],
    ]


def _norm(weights: Arrays, width: int, kind: str) -> dict[str, np.ndarray]:
    """The norm's parameters by our names; ScaleNorm has one number for all channels, and some norms have none."""
    start = {"scale": np.ones(width, np.float32)}
    start |= {} if kind == "rms" else {"bias": np.zeros(width, np.float32)}
    if kind == "batch":
        moments = [weights[f"norm.norm.running_{name}"] for name in ("mean", "var")]
        start["statistics/moments"] = np.stack(moments)
    found = start | {ours: weights[key] for key, ours in NORM_NAMES.items() if key in weights}
    if "norm.norm.scalar" in weights:
        found["scale"] = np.repeat(weights["norm.norm.scalar"], width)
    return {f"own_norm/{name}": array for name, array in found.items()}


def replay(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The layer, its moving average and its attention's weights; where it is causal, token by token, too."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])
    fields, norm = _fields(config), choose(NORMS, config["norm_type"], "norm_type")
    own = _norm(weights, x.shape[-1], norm)
    mixer, tokens = MIXERS["mega"](**fields), tokens_of(x.shape[1])
    inner = {name: w for name, w in weights.items() if not name.startswith("norm.")}
    rules = _rules(weights, fields, own if config["prenorm"] else ())
    variables = params_of(mixer, rules, inner | (own if config["prenorm"] else {}), x, tokens)
    out, (average, attention), _ = jax.jit(lambda v, x: mixer.apply(v, x, tokens, method="parts"))(variables, x)

    def layer(mixed: Any) -> Any:
        """With the residual and, in a post-norm layer, the norm."""
        if config["prenorm"]:
            return x + mixed
        module = make_norm(norm, EPSILON, jnp.float32, jnp.float32)()
        own_params = unflatten_dict({tuple(name.split("/")[1:]): w for name, w in own.items()})
        return module.apply({"params": own_params}, x + mixed)

    length = x.shape[1]  # a chunk may be longer
    outputs = {"out.ema": average, "out.y": layer(out), "out.attn": attention[..., :length, :length]}
    if mixer.causal:  # the published recurrence knows of no truncation
        endless = MIXERS["mega"](**fields | {"truncation": 0})
        outputs["out.y_step"] = layer(one_by_one(endless, variables, x))
    return outputs
