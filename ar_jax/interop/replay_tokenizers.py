"""Official tokenizers run anew: from their weights and inputs to all their outputs, in the official layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.config import build
from ar_jax.interop import tokenizers as interop
from ar_jax.interop.rules import Rule
from ar_jax.interop.transfer import to_ours
from ar_jax.tokenizers import TOKENIZERS
from ar_jax.tokenizers.learned import LearnedTokenizer, Network

Arrays = Mapping[str, np.ndarray]
Meta = Mapping[str, Any]


def load(
    meta: Meta, weights: Arrays, inputs: Arrays, rules: Callable[[LearnedTokenizer], list[Rule]]
) -> tuple[LearnedTokenizer, Any]:
    """The tokenizer of official sizes, and its parameters from official weights."""
    batch, channels, height, width = inputs["in.image"].shape
    shape = (height, width, channels)
    tokenizer = build(TOKENIZERS, interop.tokenizer_of(meta, weights), "tokenizer", shape=shape)
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    like = jax.eval_shape(tokenizer.network.init, jax.random.key(0), images)["params"]
    return tokenizer, to_ours(rules(tokenizer), weights, like).params


def replay_llamagen_vq(meta: Meta, weights: Arrays, inputs: Arrays) -> dict[str, np.ndarray]:
    """LlamaGen's VQ: latents, codes, losses, and images from both."""
    tokenizer, params = load(meta, weights, inputs, interop.llamagen_vq)
    run = _runner(tokenizer.network, params)
    images = _last(inputs["in.image"])
    quantized = run("quantize", images)
    named = run("lookup", jnp.asarray(inputs["in.codes"], jnp.int32)).reshape(quantized.values.shape)
    return _outputs(
        meta,
        {
            "z": _first(run("encode", images)),
            "quant": _first(quantized.values),
            "indices": quantized.codes,
            "recon": _first(run("decode", quantized.values)),
            "decoded": _first(run("decode", named)),
            "vq_loss": quantized.losses["codebook"],
            "commit_loss": quantized.losses["commitment"],
            "entropy_loss": quantized.losses.get("entropy", 0.0),
        },
    )


def replay_var_vqvae(meta: Meta, weights: Arrays, inputs: Arrays) -> dict[str, np.ndarray]:
    """VAR's VQVAE: latents, codes, what VAR is fed, and images after each scale."""
    tokenizer, params = load(meta, weights, inputs, interop.var_vqvae)
    run = _runner(tokenizer.network, params)
    images, tokens = _last(inputs["in.image"]), jnp.asarray(inputs["in.tokens"], jnp.int32)
    quantized = run("quantize", images)
    sizes = [rows * cols for rows, cols in tokenizer.layout]
    fed = np.arange(sizes[0], sum(sizes))
    resample = jax.jit(lambda codes: tokenizer.resample(params, codes, fed))
    ends = np.cumsum(sizes)
    known = [jnp.broadcast_to(np.arange(ends[-1]) < end, tokens.shape) for end in ends]
    stages = [jnp.clip(run("decode", run("lookup", quantized.codes, mask)), -1, 1) for mask in known]
    return _outputs(
        meta,
        {
            "f": _first(run("encode", images)),
            "indices": quantized.codes,
            "var_input": resample(quantized.codes),
            "recon": _first(stages[-1]),
            "recon_scales": jnp.stack([_first(stage) for stage in stages], axis=1),
            "tokens_var_input": resample(tokens),
            "tokens_f_hat": _first(run("lookup", tokens)),
            "tokens_image": _first(jnp.clip(run("decode", run("lookup", tokens)), -1, 1)),
            "f_hat": _first(quantized.values),
            "vq_loss": quantized.losses["codebook"] + quantized.losses["commitment"],
        },
    )


def replay_titok(meta: Meta, weights: Arrays, inputs: Arrays) -> dict[str, np.ndarray]:
    """TiTok, with proxy codes or with pixels: latents, codes, losses, and images from both."""
    tokenizer, params = load(meta, weights, inputs, interop.titok)
    run = _runner(tokenizer.network, params)
    images = _last(inputs["in.image"])
    quantized = run("quantize", images)
    codebook, commitment = quantized.losses["codebook"], quantized.losses["commitment"]
    return _outputs(
        meta,
        {
            "z": _line(run("encode", images)),
            "quant": _line(quantized.values),
            "indices": quantized.codes,
            "recon": _first(run("decode", quantized.values)),
            "decoded": _first(run("decode", run("lookup", jnp.asarray(inputs["in.tokens"], jnp.int32)))),
            "quantizer_loss": codebook + commitment,
            "commitment_loss": commitment,
            "codebook_loss": codebook,
        },
    )


def _runner(network: Network, params: Any) -> Callable[..., Any]:
    """The network's methods by name, compiled."""

    @functools.partial(jax.jit, static_argnums=0)
    def apply(method: str, params: Any, *args: Any) -> Any:
        return network.apply({"params": params}, *args, method=method)

    return lambda method, *args: apply(method, params, *args)


def _outputs(meta: Meta, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The outputs that `meta` names, with its types and shapes."""
    return {
        name: np.asarray(values[name.removeprefix("out.")]).astype(facts["dtype"]).reshape(facts["shape"])
        for name, facts in meta["outputs"].items()
    }


def _last(images: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(images), 1, -1)


def _first(values: jax.Array) -> jax.Array:
    return jnp.moveaxis(values, -1, 1)


def _line(values: jax.Array) -> jax.Array:
    """[B, K, C] as [B, C, 1, K]."""
    return values.swapaxes(1, 2)[:, :, None]


REPLAYS = {
    "llamagen_vq": replay_llamagen_vq,
    "var_vqvae": replay_var_vqvae,
    "titok": replay_titok,
    "titok_rgb": replay_titok,
}
