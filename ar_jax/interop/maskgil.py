"""MaskGIL (S033, arXiv:2507.13032): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from ar_jax.heads.noise import Recorded
from ar_jax.interop import llamagen
from ar_jax.interop.generators import Outputs, Weights, official_run
from ar_jax.interop.maskgit import hidden_under_mask
from ar_jax.interop.rules import norm, prefixed, rows
from ar_jax.mixers.protocol import take
from ar_jax.models.generator import Context
from ar_jax.system import System


def rules(system: System) -> list[Any]:
    """The network's weights: LlamaGen's layers, and one table of the codes, the mask and the classes."""
    generator = system.model.generator
    vocab, classes = generator.vocab_size, generator.condition.num_classes
    table = {"value_embed/embedding": (0, vocab), "condition/embed/embedding": (vocab, vocab + classes + 1)}
    return prefixed(
        "",
        "generator/",
        [
            rows("tok_emb.weight", table),
            llamagen.layers(generator.decoder.num_layers, "decoder/stack"),
            norm("norm", "decoder/norm", bias=False),
            llamagen.plain("output", "head/logits"),
        ],
    )


def as_published(model: dict[str, Any]) -> dict[str, Any]:
    """`config.model` of LlamaGen as MaskGIL's code changes it: a mask that has a logit, and rotations along a line."""
    return model | dict(blank_token=True, mixer=model["mixer"] | dict(rope_places="line_behind"))


def _config(meta: Mapping[str, Any], sizes: str) -> dict[str, Any]:
    given = meta["config"]
    config = llamagen.from_arguments(given)
    config["model"] = as_published(config["model"])
    config["head"] |= dict(confidence="log_probability")
    smoothing = given.get("label_smoothing", 0.1)
    return config | dict(
        order=dict(kind="random"),
        objective=dict(kind="masked", schedule="arccos", known_weight=1.0, label_smoothing=smoothing),
        sampling=dict(order=dict(kind="random", num_steps=given["step"], sizes=sizes, adaptive=True)),
    )


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Logits and loss of all tokens under masks; generation by confidence from recorded noise."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    systems = {}
    for sizes in ("arccos_shares", "cosine_shares"):
        systems[sizes], params = official_run(_config(meta, sizes), given.get("num_classes", 1000), rules, weights)
    system, batch = systems["arccos_shares"], len(labels)
    tokens = jnp.asarray(inputs["in.tokens"], jnp.int32).reshape(batch, -1)
    mask = jnp.asarray(inputs["in.masks"], jnp.int32).reshape(batch, -1)
    read = functools.partial(hidden_under_mask, system, params, tokens, mask, labels)
    hidden = read()
    loss = system.model.ask(
        params, "loss", hidden, tokens, jax.random.key(0), label_smoothing=system.objective.label_smoothing
    )
    run = functools.partial(_sampled, params=params, labels=labels, inputs=inputs)
    scale, heat, warmth = given.get("w", 3.0), given.get("r_temp", 4.5), 1 / given.get("sm_temp", 1)
    return {
        "out.logits": system.model.ask(params, "__call__", hidden),
        "out.logits_uncond": system.model.ask(params, "__call__", read(drop=True)),
        "out.loss": loss.mean(),
        "out.sample": run(
            systems["arccos_shares"], confidence_temperature=heat, temperature=warmth, guidance_scale=1.0 + scale,
            guidance_schedule="linear_steps",
        ),
        "out.sample_schedule": np.asarray(systems["arccos_shares"].sampler.order.sizes),
        "out.sample_no_cfg": run(systems["cosine_shares"], confidence_temperature=0.0, temperature=warmth),
        "out.sample_no_cfg_schedule": np.asarray(systems["cosine_shares"].sampler.order.sizes),
    }  # fmt: skip


@struct.dataclass
class Drawn(Recorded):
    """Recorded draws as the fixtures have them: tokens by uniform numbers, confidences by Gumbel noise itself."""

    def gumbel(self, name: str, shape: tuple[int, ...]) -> Array:
        """See Noise; what was recorded."""
        return self.normal(name, shape)

    def categorical(self, name: str, logits: Array) -> Array:
        """See Noise: as many tokens lie before the one drawn as have a cumulated probability below the uniform number."""
        below = jnp.cumsum(jax.nn.softmax(logits), axis=-1) < self.uniform(name, logits.shape[:-1])[..., None]
        return jnp.minimum(below.sum(axis=-1), logits.shape[-1] - 1).astype(jnp.int32)


def _sampled(system: System, params: Any, labels: Array, inputs: Weights, **drawing: Any) -> np.ndarray:
    """Tokens [B, L] int64 from the recorded noise."""
    arrays = {"token": jnp.asarray(inputs["in.u"]), "confidence": jnp.asarray(inputs["in.gumbel"])}

    def recorded(step: ArrayLike, slots: Array) -> Drawn:
        return Drawn({name: take(array[step], slots) for name, array in arrays.items()})

    length, batch = system.model.order.length, len(labels)
    slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    context = Context(slots, labels, jnp.zeros(batch, bool))
    told = system.drawing(temperature_schedule="linear_steps", **drawing)
    sample = jax.jit(lambda params, context: system.sample_in_order(params, context, recorded, told))
    return np.asarray(sample(params, context), np.int64)
