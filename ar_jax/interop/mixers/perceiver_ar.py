"""Official runs of Perceiver AR (haiku), and of a community's code: latents on the last tokens, and greedy continuations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.interop.generators import cross_entropy
from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.rotary import pairs_of_halves
from ar_jax.interop.mixers.sequences import Outputs, params_of, swapped
from ar_jax.interop.rules import linear, norm, prefixed, same, stacked
from ar_jax.mixers.protocol import NEVER, Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import mixer_pattern
from ar_jax.models.perceiver_ar import PerceiverAR

EPSILON = 1e-5
DEFAULTS: dict[str, Any] = {
    "position_encoding_type": "rotary",
    "input_embed_dim": 1024,
    "num_transformers_per_block": 12,
    "z_index_dim": 1024,
    "num_z_channels": 1024,
    "num_cross_attend_heads": 1,
    "num_transformer_heads": 8,
    "initial_query_offsetting": False,
    "initial_query_embed_style": "none",
    "initial_query_embed_num_layers": 2,
    "initial_query_embed_activation_name": "sq_relu",
    "include_initial_cross_attention": True,
    "cross_attention_shape_for_attn": "kv",
    "encoder_use_query_residual": True,
    "num_latents_per_position": 1,
    "activation_name": "sq_relu",
    "fraction_to_rotate": 0.25,
    "fraction_heads_to_rotate": 1.0,
    "max_wavelength": 8192,
    "use_negative_rotary_positions": False,
}
ACTIVATIONS = {"sq_relu": "relu2", "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}  # jax.nn's


def _turns(told: Mapping[str, Any], heads: int, head_dim: int) -> dict[str, Any]:
    """The rotary fields of an attention: the slowest pair turns once in max_wavelength, both ends of the scale included."""
    channels = 2 * math.floor(head_dim * told["fraction_to_rotate"] / 2)
    count = math.floor(heads * told["fraction_heads_to_rotate"])
    if told["position_encoding_type"] != "rotary" or not channels or not count:
        return {"rope_base": 0.0}
    pairs = channels // 2
    longest = float(told["max_wavelength"] + told["initial_query_offsetting"])
    return {
        "rope_base": longest ** (pairs / (pairs - 1)) if pairs > 1 else longest,
        "rope_channels": channels,
        "rope_heads": count,
    }


def _official_model(told: Mapping[str, Any], weights: Arrays) -> PerceiverAR:
    wide, width, sides = told["input_embed_dim"], told["num_z_channels"], told["num_latents_per_position"]
    after = sorted(told.get("additional_cross_attend_after_layers") or [])
    style = told["initial_query_embed_style"]
    if style == "mlp" and told["initial_query_embed_activation_name"] != told["activation_name"]:
        raise UsageError(
            "initial_query_embed_activation_name must be activation_name; there is one activation for all."
        )
    hidden = {
        kind: next((w.shape[1] for name, w in weights.items() if name == f"{kind}_attention_0/dense/linear_0/w"), None)
        for kind in ("self", "cross")
    }
    options = BlockOptions(
        mlp_dim=hidden["self"], norm="layer", norm_epsilon=EPSILON, activation=ACTIVATIONS[told["activation_name"]],
        gated=False, mlp_bias=True,
    )  # fmt: skip

    def mixer(heads: int, head_dim: int) -> Any:
        biased = {"kind": "softmax", "num_heads": heads, "head_dim": head_dim, "qkv_bias": True, "out_bias": True}
        return mixer_pattern(biased | _turns(told, heads, head_dim), embed_dim=width)

    far = (wide if told["cross_attention_shape_for_attn"] == "kv" else width) // told["num_cross_attend_heads"]
    return PerceiverAR(
        embed_dim=wide,
        mixers=mixer(told["num_cross_attend_heads"], far),
        options=options,
        decoder_mixers=mixer(told["num_transformer_heads"], width // told["num_transformer_heads"]),
        num_layers=told["num_transformers_per_block"],
        decoder_dim=width,
        num_latents=told["z_index_dim"] // sides,
        cross_after=(0,) * told["include_initial_cross_attention"] + tuple(layer + 1 for layer in after),
        cross_mlp_dim=hidden["cross"],
        query="learned" if style == "learned" else "linear",
        query_layers=told["initial_query_embed_num_layers"] if style == "mlp" else 0,
        # Positions count from the end there: what is added to one leads back.
        query_offset=(1 if told["use_negative_rotary_positions"] else -1) * told["initial_query_offsetting"],
        query_residual=told["encoder_use_query_residual"],
        latents_per_token=sides,
    )


def _official(told: Mapping[str, Any], weights: Arrays) -> dict[str, np.ndarray]:
    """The weights under names that count from 0, for positions that count from the start."""
    tidy = re.compile(r"(self_attention|cross_attention|linear|layer_norm)(?=/)")
    named = {tidy.sub(r"\1_0", name.removeprefix("perceiver_ar/").removeprefix("~/")): w for name, w in weights.items()}
    found: dict[str, np.ndarray] = {}
    for name, array in named.items():
        if re.match(r"embed(_\d+)?/|logits/", name):
            continue
        match = re.match(r"(self|cross)_attention_\d+/attention/linear_[01]/", name)
        if match and told["position_encoding_type"] == "rotary" and not told["use_negative_rotary_positions"]:
            heads = told["num_transformer_heads" if match[1] == "self" else "num_cross_attend_heads"]
            array = _turned_back(array, heads, told)
        found[name] = array
    if "q_embed_learned" in found:
        rows = told["z_index_dim"] // len(found["q_embed_learned"])
        found["q_embed_learned"] = np.repeat(found["q_embed_learned"], rows, axis=0)
    return found


def _turned_back(array: np.ndarray, heads: int, told: Mapping[str, Any]) -> np.ndarray:
    """Queries' or keys' weights [..., heads H] with the two channels of each turning pair exchanged: they turn the other way."""
    split = np.array(array).reshape(*array.shape[:-1], heads, -1)
    turns = _turns(told, heads, split.shape[-1])
    if "rope_channels" in turns:
        count, channels = turns["rope_heads"], turns["rope_channels"]
        part = split[..., :count, :channels]
        split[..., :count, :channels] = part.reshape(*part.shape[:-1], -1, 2)[..., ::-1].reshape(part.shape)
    return split.reshape(array.shape)


def _dense(official: str, ours: str) -> list[Any]:
    return [same(f"{official}/w", f"{ours}/kernel"), same(f"{official}/b", f"{ours}/bias")]


def _norm(official: str, ours: str) -> list[Any]:
    return [same(f"{official}/scale", f"{ours}/scale"), same(f"{official}/offset", f"{ours}/bias")]


def _attention(ours: str, norms: tuple[str, ...]) -> list[Any]:
    return [
        [_dense(f"attention/linear_{i}", f"{ours}/{name}") for i, name in enumerate(("query", "key", "value", "out"))],
        [_norm(f"layer_norm_{i}", name) for i, name in enumerate(norms)],
        [_dense(f"dense/linear_{i}", f"mlp/{name}") for i, name in enumerate(("up", "down"))],
    ]


def _layers(model: PerceiverAR, official: str, rules: list[Any]) -> list[Any]:
    """The rules of a layer for those of all stages; `{i}` in official names counts through."""
    counts = [count for _, count in model.stages if count]
    firsts = np.cumsum([0, *counts])
    return [
        stacked(range(first, first + count), prefixed(official, f"layers_{stage}/layers/block_0/", rules))
        for stage, (first, count) in enumerate(zip(firsts, counts, strict=False))
    ]


def _official_rules(model: PerceiverAR) -> list[Any]:
    crosses = [
        prefixed(
            f"cross_attention_{i}/", f"cross_{i}/", _attention("attention", ("query_norm", "memory_norm", "mlp_norm"))
        )
        for i in range(len(model.cross_after))
    ]
    layer = _attention("mixer", ("mixer_norm", "mlp_norm"))
    queries = [_dense(f"linear_{i}", f"query_denses_{i}") for i in range(model.query_layers)]
    first = _dense(f"linear_{model.query_layers}", "query_embed") if model.query == "linear" else []
    return [
        *crosses,
        _layers(model, "self_attention_{i}/", layer),
        _norm("layer_norm_0", "norm"),
        queries,
        first,
        [same("q_embed_learned", "learned")] if model.query == "learned" else [],
        [same("z_pos_enc/pos_embs", "side")] if model.latents_per_token > 1 else [],
    ]


def replay_official(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Latents on the last tokens that are no padding, their masks and logits, and a continuation that starts afresh each time."""
    config = meta["config"]
    told = DEFAULTS | dict(config["kw"])
    given = jnp.asarray(inputs["in.tokens"], jnp.int32)
    official = _official(told, weights)
    model = _official_model(told, official)
    count, length = model.num_latents, given.shape[1]
    table = jnp.asarray(weights["perceiver_ar/~/embed/embeddings"])
    places = weights.get("perceiver_ar/~/embed_1/embeddings")
    head, bias = (jnp.asarray(weights[f"perceiver_ar/~/logits/{name}"]) for name in "wb")

    alone = told["z_index_dim"] == 1  # a single latent stands at the very end and reads all, padding with it

    def lengths(values: Array) -> Array:
        """[B, 1], how many tokens come before the first padding."""
        there = values > 0
        return jnp.where(there.all(axis=1), values.shape[1], jnp.argmin(there, axis=1))[:, None]

    def tokens_of(values: Array) -> tuple[Array, Tokens]:
        """Embeddings, and where and when they are: places count from the end of an example, and come round behind it."""
        size, place = values.shape[1], jnp.arange(values.shape[1], dtype=jnp.int32)[None]
        there, total = values > 0, lengths(values)
        x = table[values]
        if places is not None:
            x = x + jnp.asarray(places)[(total - 1 - place) % size]
        forward = size + jnp.where(
            place < total, place, place - size
        )  # none is negative, though queries may stand one back
        end = size if alone else total
        asked = jnp.broadcast_to((place >= end - count) & (place < end), values.shape)
        step = place if alone else jnp.where(there, place, NEVER)
        tokens = Tokens(step, forward[..., None], size, padded=not alone, asked=asked, num_asked=count)
        return x, tokens

    def logits(variables: Any, values: Array) -> Array:
        """Of all places, those of latents only."""
        x, tokens = tokens_of(values)
        return model.apply(variables, x, tokens)[0] @ head + bias[None, None]

    x, tokens = tokens_of(given)
    variables = params_of(model, _official_rules(model), official, x, tokens)
    whole = jax.jit(logits)(variables, given)
    ends = np.full((len(given), 1), length) if alone else np.asarray(lengths(given))
    latent = np.maximum(ends - count + np.arange(count)[None], -1)
    sides = np.repeat(latent, model.latents_per_token, axis=1)
    readable = (sides[:, :, None] >= np.arange(length)[None, None]) & (np.asarray(given) > 0)[:, None]
    among = (sides[:, :, None] >= sides[:, None]) & (sides >= 0)[:, None]
    prompt = np.zeros((1, length), np.int32)
    prompt[:, : config["prompt"]] = given[:1, : config["prompt"]]

    @jax.jit
    def continued(variables: Any, values: Array) -> Array:
        def step(values: Array, place: Array) -> tuple[Array, None]:
            last = length - 1 if alone else place - 1
            out = jax.lax.dynamic_index_in_dim(logits(variables, values), last, axis=1, keepdims=False)
            return values.at[:, place].set(1 + out[:, 1:].argmax(axis=-1)), None

        return jax.lax.scan(step, values, jnp.arange(config["prompt"], length))[0]

    return {
        "out.logits": jnp.take_along_axis(whole, jnp.asarray(latent)[..., None], axis=1),
        "out.latent_last_steps": latent,
        "out.encoder_mask": readable[:, None],
        "out.processor_mask": (among | np.eye(sides.shape[1], dtype=bool)[None])[:, None],
        "out.greedy": continued(variables, jnp.asarray(prompt)),
    }


def _community_rules(model: PerceiverAR) -> list[Any]:
    def feed_forward(official: str) -> list[Any]:
        ups = [linear(f"{official}.{i}", f"mlp/{name}", bias=False) for i, name in ((1, "up"), (4, "down"))]
        return [norm(f"{official}.0", "mlp_norm"), *ups]

    def attention(ours: str, out_bias: bool) -> list[Any]:
        return [
            [linear(f"0.{name}", f"{ours}/{name}", bias=False) for name in ("query", "key", "value")],
            linear("0.to_out", f"{ours}/out", bias=out_bias),
        ]

    cross = [
        attention("attention", True), norm("0.norm", "query_norm"), norm("0.context_norm", "memory_norm"), feed_forward("1")
    ]  # fmt: skip
    layer = [attention("mixer", False), norm("0.norm", "mixer_norm"), feed_forward("1")]
    crosses = [prefixed(f"perceive_layers.{i}.", f"cross_{i}/", cross) for i in range(len(model.cross_after))]
    return [*crosses, _layers(model, "layers.{i}.", layer)]


def _community(weights: Arrays, heads: int, channels: int) -> dict[str, np.ndarray]:
    """The weights, packed projections cut, and sorted for pairs that turn."""
    found: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        if not name.startswith(("layers.", "perceive_layers.")):
            continue
        kinds = {"to_qkv": ("query", "key", "value"), "to_q": ("query",), "to_kv": ("key", "value")}.get(
            name.split(".")[-2]
        )
        if kinds is None:
            found[name] = array
            continue
        for kind, rows in zip(kinds, np.split(array, len(kinds)), strict=True):
            place = name.rsplit(".", 2)[0]
            found[f"{place}.{kind}.weight"] = rows if kind == "value" else pairs_of_halves(rows, heads, channels)
    return found


def replay_community(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Logits and loss of the tokens behind a prefix, with some of it hidden, too, and a continuation from the state."""
    config = meta["config"]
    heads, head_dim, prefix = config.get("heads", 8), config.get("dim_head", 64), config["cross"]
    # The official speeds are of that many channels, of which an odd number turns one more.
    speeds = max(32, head_dim // 2)
    channels = speeds + speeds % 2
    options = BlockOptions(
        mlp_dim=len(weights["layers.0.1.1.weight"]),
        norm="layer",
        norm_epsilon=EPSILON,
        activation="gelu_exact",
        gated=False,
    )
    mixer = {"kind": "softmax", "num_heads": heads, "head_dim": head_dim, "rope_channels": channels}
    mixer |= {"rope_base": 10000.0 ** (channels / speeds)}
    model = PerceiverAR(
        embed_dim=config["dim"],
        mixers=mixer_pattern(mixer | {"out_bias": True}, embed_dim=config["dim"]),
        options=options,
        decoder_mixers=mixer_pattern(mixer, embed_dim=config["dim"]),
        num_layers=config["depth"],
        num_latents=config["max_seq_len"] - prefix,
        cross_after=(0,) * config.get("perceive_depth", 1),
        query="identity",
        own_keys=True,
        final_norm=False,
    )
    given, labels = (jnp.asarray(inputs[f"in.{name}"], jnp.int32) for name in ("tokens", "labels"))
    table, places, head = (
        jnp.asarray(weights[name]) for name in ("token_emb.weight", "pos_emb.weight", "to_logits.weight")
    )

    def embedded(values: Array, first: Array | int, hidden: Array | None = None) -> tuple[Array, Tokens]:
        place = (first + jnp.arange(values.shape[1], dtype=jnp.int32))[None]
        step = place if hidden is None else jnp.where(place < hidden[:, None], NEVER, place)
        asked = place >= prefix
        count = max(values.shape[1] - prefix, 1)
        tokens = Tokens(
            step, place[..., None], values.shape[1], padded=hidden is not None, asked=asked, num_asked=count
        )
        return table[values] + places[place], tokens

    variables = params_of(model, _community_rules(model), _community(weights, heads, channels), *embedded(given, 0))

    def logits(variables: Any, values: Array, first: Any, hidden: Any = None, state: Any = None) -> tuple[Array, Any]:
        x, tokens = embedded(values, first, hidden)
        out: Any = model.apply(variables, x, tokens, None, state)
        return out[0] @ head.T, out[1]

    @jax.jit
    def continued(variables: Any, prompt: Array) -> Array:
        """[steps, B]."""

        def step(carry: Any, index: Array) -> tuple[Any, Array]:
            token, state = carry
            out, state = logits(variables, token[:, None], index, None, state)
            return (out[:, -1].argmax(axis=-1), state), token

        batch, start = prompt.shape
        out, state = logits(variables, prompt, 0, None, model.init_state(batch, config["max_seq_len"], start))
        first = out[:, -1].argmax(axis=-1), state
        return jax.lax.scan(step, first, jnp.arange(start, config["max_seq_len"]))[1]

    run = jax.jit(lambda variables, hidden: logits(variables, given, 0, hidden)[0][:, prefix:])
    whole = run(variables, None)
    wanted = labels[:, prefix:]
    counted = wanted != 0
    prompt = given[:, : prefix + 2]
    return {
        "out.logits": whole,
        "out.loss": (cross_entropy(whole, wanted) * counted).sum() / counted.sum(),
        "out.logits_prefix_mask": run(variables, jnp.asarray(inputs["in.prefix_pad"], jnp.int32)),
        "out.greedy": jnp.concatenate([prompt, swapped(continued(variables, prompt))], axis=1),
    }
