"""NAR (S016, arXiv:2503.10696): the official weights' names beside ours, and replays of official runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.feeds.protocol import prefix_steps
from ar_jax.interop import llamagen
from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, logits_in_order, official_run
from ar_jax.interop.rules import MATRIX, embedding, join, norm, prefixed, same
from ar_jax.kernels.step_attention import visibility
from ar_jax.system import System


def rules(system: System) -> list[Any]:
    """The network's weights: LlamaGen's, and the layers, the norm and the head of the second output."""
    decoder = system.model.generator.decoder
    first, (more,) = decoder.num_layers, decoder.branch_layers
    width = decoder.embed_dim
    return prefixed(
        "",
        "generator/",
        [
            embedding("tok_embeddings", "value_embed"),
            llamagen.condition(system),
            llamagen.layers(first, "decoder/stack"),
            llamagen.layers(range(first, first + more), "decoder/branches_0") if more else [],
            norm("norm", "decoder/norm", bias=False),
            norm("medusa_norm", "decoder/branch_norms_0", bias=False),
            join({"output.weight": width, "medusa_output.weight": width}, "head/logits/kernel", layout=MATRIX),
        ],
    )


def video_rules(system: System) -> list[Any]:
    """The weights of the network for videos: outputs along the width, the height and time, and learned places of all tokens."""
    decoder = system.model.generator.decoder
    ends = np.cumsum([decoder.num_layers, *decoder.branch_layers])
    places = (1, 1 + system.model.order.length, decoder.embed_dim)
    outputs = ("norm", "branch_norms_0", "branch_norms_1")
    return prefixed(
        "",
        "generator/",
        [
            embedding("tok_embeddings", "value_embed"),
            llamagen.condition(system),
            same("abs_pe", "position_embed/embedding", shape=places),
            llamagen.layers(decoder.num_layers, "decoder/stack"),
            [
                llamagen.layers(range(first, last), f"decoder/branches_{number}")
                for number, (first, last) in enumerate(itertools.pairwise(ends.tolist()))
            ],
            [norm(f"norm_{way}", f"decoder/{ours}", bias=False) for way, ours in zip("RDB", outputs, strict=True)],
            join({f"output_{way}.weight": decoder.embed_dim for way in "RDB"}, "head/logits/kernel", layout=MATRIX),
        ],
    )


def video_model_config(**size: Any) -> dict[str, Any]:
    """`config.model` of NAR for videos: nothing is turned, places are learned, two further outputs of a layer each."""
    return llamagen.model_config(**size, rope_base=0.0) | dict(
        branch_layers=(1, 1), learned_positions=True, prefix_positions=True
    )


def model_config(**size: Any) -> dict[str, Any]:
    """`config.model` of NAR: LlamaGen's, with a layer more, behind which a second output is read."""
    return llamagen.model_config(**size) | dict(branch_layers=(1,))


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    given = meta["config"]
    config = llamagen.from_arguments(given)
    config["model"]["branch_layers"] = (given.get("medusa_attention_num", 1),)
    return config | dict(order=dict(kind="nearest"), feed=dict(kind="neighbors"))


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Teacher-forced logits on their cells, loss and mask; greedy generation, one diagonal a step."""
    given = meta["config"]
    text = given.get("model_type") == "t2i"
    condition = _caption(inputs) if text else jnp.asarray(inputs["in.classes"], jnp.int32)
    system, params = official_run(_config(meta), given.get("num_classes", 1000), rules, weights)
    model, batch = system.model, len(inputs["in.tokens"])
    by_rank, target = logits_in_order(system, params, inputs["in.tokens"], condition)
    back = np.argsort(np.asarray(model.order.slots(None, 1)[0]))
    valid = np.asarray(inputs.get("in.valid", np.ones(batch)), np.float32)
    nats = cross_entropy(by_rank, target).mean(axis=1)
    run = functools.partial(greedy, system, params, condition, batch)
    scale, interval = max(given.get("cfg_scale", 1.0), 1.0), given.get("cfg_interval", -1)
    return {
        "out.logits": by_rank[:, back],
        "out.loss": (nats * valid).sum() / max(valid.sum(), 1),
        "out.mask": _mask(system),
        "out.greedy": run(guidance_scale=1.0),
        "out.greedy_cfg": run(guidance_scale=scale),
        "out.greedy_cfg_interval": run(guidance_scale=scale, guidance_steps=_guided_steps(system, interval)),
    }


def _caption(inputs: Weights) -> dict[str, Any]:
    caption = jnp.asarray(inputs["in.caption"], jnp.float32)
    mask = jnp.asarray(inputs.get("in.emb_masks", np.ones(caption.shape[:2]))) > 0
    return {"embedding": caption, "mask": mask}


def _guided_steps(system: System, interval: int) -> int | None:
    """The official interval counts tokens, and the first step is always guided."""
    known = np.cumsum(system.model.order.sizes)[:-1]
    return None if interval < 0 else 1 + int((known <= interval).sum())


def _mask(system: System) -> np.ndarray:
    """[P + L, P + L] int64: who reads whom, the prefix first and the tokens on their slots."""
    steps = np.concatenate([prefix_steps(system.model.num_prefix), system.model.order.step + 1])
    seen = visibility(jnp.asarray(steps)[None], jnp.asarray(steps)[None]).dense()
    return np.asarray(seen[0], np.int64)
