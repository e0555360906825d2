"""Official runs of gated state spaces (a community's code): the layer, and a language model of such layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.interop.generators import cross_entropy
from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, params_of, swapped, tokens_of
from ar_jax.interop.rules import linear, same
from ar_jax.mixers import MIXERS
from ar_jax.mixers.norms import make_norm
from ar_jax.mixers.protocol import Tokens

EPSILON = 1e-5
plain = functools.partial(linear, bias=False)
LAYER = [
    plain("to_u.0", "gate"),
    plain("to_v.0", "value"),
    plain("to_gate", "lift"),
    linear("to_out", "out"),
    [same(f"dss.norm.{there}", f"norm/{ours}") for there, ours in (("weight", "scale"), ("bias", "bias"))],
    same("dss.param_D", "skip"),
    same("poles", "poles"),
    same("read", "read"),
]
PAIRS = {"poles": ("dss.Lambda_real", "dss.Lambda_imag"), "read": ("dss.C_real", "dss.C_imag")}


def _official(weights: Arrays) -> dict[str, Any]:
    """The parameters of one layer's mixer from official names, whose pairs of real and imaginary parts are stacked."""
    paired = [name for pair in PAIRS.values() for name in pair]
    official = {name: w for name, w in weights.items() if name not in paired and not name.startswith("norm.")}
    official |= {ours: np.stack([weights[name] for name in pair]) for ours, pair in PAIRS.items()}
    return official


def _split(weights: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _stack(config: Mapping[str, Any], layers: Sequence[Arrays]) -> tuple[Any, list[tuple[Any, Any]]]:
    """The mixer, and of each layer the norm's parameters and the mixer's."""
    mixer = MIXERS["gss"](
        embed_dim=config["dim"], state_dim=config["N"], dss_dim=config["H"], gate_dim=int(config["exp"] * config["dim"]),
        log_frequency=config.get("imag_exp", True), norm_epsilon=EPSILON,
    )  # fmt: skip
    x = jnp.zeros((1, 2, config["dim"]))
    norms = [{"params": {"scale": w["norm.weight"], "bias": w["norm.bias"]}} for w in layers]
    return mixer, [
        (norm, params_of(mixer, LAYER, _official(w), x, tokens_of(2))) for norm, w in zip(norms, layers, strict=True)
    ]


def _run(mixer: Any, layers: Any, x: Array, tokens: Tokens, states: Any = None) -> tuple[Array, Any]:
    """x + mixer(norm(x)), layer by layer, and the states after."""
    norm = make_norm("layer", EPSILON, jnp.float32, jnp.float32)()
    after: list[Any] = []
    for i, (norm_params, variables) in enumerate(layers):
        mixed, state = mixer.apply(variables, norm.apply(norm_params, x), tokens, None if states is None else states[i])
        x, after = x + mixed, [*after, state]
    return x, after


def replay_layer(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The layer with its residual, read from its end where it is reversed, and its state space."""
    config, x = meta["config"], jnp.asarray(inputs["in.x"])
    tokens = tokens_of(x.shape[1])
    mixer, layers = _stack(config, [weights])
    turn = -1 if config["reverse"] else 1

    @jax.jit
    def run(layers: Any, x: Array) -> tuple[Array, Array]:
        out, _ = _run(mixer, layers, x[:, ::turn], tokens)
        (norm_params, variables) = layers[0]
        normed = make_norm("layer", EPSILON, jnp.float32, jnp.float32)().apply(norm_params, x)
        values = nn.gelu(normed @ variables["params"]["value"]["kernel"], approximate=False)
        return out[:, ::turn], mixer.apply(variables, values, tokens, method="state_space")[0]

    y, remembered = run(layers, x)
    return {"out.y": y, "out.dss_of_v": remembered}


def replay_lm(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Logits and loss of a sequence read whole, and a continuation that is drawn token by token from the state."""
    config = meta["config"]
    mixer, layers = _stack(config, [_split(weights, f"layers.{i}.") for i in range(config["depth"])])
    table, head = jnp.asarray(weights["token_emb.weight"]), jnp.asarray(weights["to_logits.weight"].T)
    given, labels = (jnp.asarray(inputs[f"in.{name}"], jnp.int32) for name in ("tokens", "labels"))

    def logits(layers: Any, values: Array, tokens: Tokens, states: Any = None) -> tuple[Array, Any]:
        x, states = _run(mixer, layers, table[values], tokens, states)
        return x @ head, states

    @jax.jit
    def continued(layers: Any, prompt: Array) -> Array:
        """[steps, B]."""

        def step(carry: Any, index: Array) -> tuple[Any, Array]:
            token, states = carry
            now = Tokens(index[None, None], index[None, None, None], 1)
            out, states = logits(layers, token[:, None], now, states)
            return (out[:, -1].argmax(axis=-1), states), token

        empty = [mixer.init_state(len(prompt), 0, 1) for _ in layers]
        out, states = logits(layers, prompt, tokens_of(prompt.shape[1]), empty)
        return jax.lax.scan(step, (out[:, -1].argmax(axis=-1), states), prompt.shape[1] + jnp.arange(config["gen"]))[1]

    whole = jax.jit(logits)(layers, given, tokens_of(given.shape[1]))[0]
    prompt = given[:, : config["prompt"]]
    return {
        "out.logits": whole,
        "out.loss": cross_entropy(whole, labels).mean(),
        "out.greedy": jnp.concatenate([prompt, swapped(continued(layers, prompt))], axis=1),
    }
