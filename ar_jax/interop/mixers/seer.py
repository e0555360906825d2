"""Official runs of SeerAttention's gates: those of blocks of queries, and those of single queries with a compressed cache."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, params_of
from ar_jax.interop.mixers.torch_top_k import torch_top_k
from ar_jax.interop.rules import same
from ar_jax.kernels.selected_attention.xla import masked_softmax
from ar_jax.mixers.common.block_gate import BlockGate, angles, in_blocks, turned_halves

FAR = -1e9  # the logit of a block that comes later


def _pools(text: str) -> tuple[str, ...]:
    """The pools in the name of an official class, such as "Kmaxminavg"."""
    return tuple(re.findall("max|min|avg", text))


def replay_prefill_gate(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """The gate of blocks of queries, three ways to choose blocks by it, and the attention that they leave."""
    config = meta["config"]
    q, k = (jnp.asarray(inputs[f"in.{name}"]) for name in ("q", "k"))
    size, heads = config["block_size"], config["Hq"]
    names = re.fullmatch("Q(.*)_K(.*)", config["cls"]).groups()  # type: ignore[union-attr]  # all official names are such
    gate = BlockGate(
        heads,
        config["Hk"],
        config["D"],
        config["gate_hidden"],
        _pools(names[1]),
        _pools(names[0]),
        project_queries="mask_linear_q.weight" in weights,
    )
    rules = [same("mask_linear_k.weight", "key_weight")]
    rules += [same("mask_linear_q.weight", "query_weight")] if gate.project_queries else []
    blocks = [in_blocks(a, size) for a in (q, k)]

    def logits_of(module: BlockGate, cos: Any, sin: Any) -> Any:
        own, keys = module.block_queries(*blocks[0]), module.keys(*blocks[1])
        return module.logits(turned_halves(own, cos, sin), turned_halves(keys, cos, sin))

    turns = [jnp.asarray(inputs[f"in.{name}"]) for name in ("cos", "sin")]
    variables = params_of(gate, rules, weights, *turns, method=logits_of)
    logits: Any = gate.apply(variables, *turns, method=logits_of)
    past = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    logits = jnp.where(past[None, None], logits, FAR)
    share = np.asarray(jax.nn.softmax(logits, axis=-1))
    chosen = _by_ratio(share, config["nz_ratio"])
    last = chosen.copy()
    last[:, :, -2:] = True
    masks = {"nz_ratio": chosen, "nz_ratio_last_dense": last, "threshold": share > config["threshold"]}
    masks = {name: mask & np.asarray(past) for name, mask in masks.items()}
    found: Outputs = {f"out.mask_{name}": mask for name, mask in masks.items()}
    return found | {
        "out.gate": share,
        "out.gate_logits": logits,
        "out.y_last_dense": _attended(inputs, masks["nz_ratio_last_dense"], size),
    }


def _by_ratio(share: np.ndarray, ratio: float) -> np.ndarray:
    """The blocks of the largest shares, so many that the given part of the lower triangle is read."""
    count = max(int((1 - np.sqrt(1 - ratio)) * share.shape[-1]), 1)
    chosen = np.zeros(share.shape, bool)
    np.put_along_axis(chosen, torch_top_k(share, count), True, axis=-1)
    return chosen


def _attended(inputs: Arrays, mask: np.ndarray, size: int) -> Any:
    """Causal attention to the tokens of the chosen blocks, whose pattern differs from head to head."""
    q, k, v = (jnp.asarray(inputs[f"in.{name}"]) for name in ("q_rope", "k_rope", "v"))
    length, heads, shared = q.shape[1], q.shape[2], k.shape[2]
    k, v = (jnp.repeat(a, heads // shared, axis=2) for a in (k, v))
    seen = np.repeat(np.repeat(mask, size, axis=2), size, axis=3)[:, :, :length, :length]
    seen = seen & np.tril(np.ones((length, length), bool))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    weights, _ = masked_softmax(logits, jnp.asarray(seen))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def replay_decode_gate(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Keys compressed at once and then block by block, and which blocks each later query chooses.

    As published, a block that fills up while decoding is turned by the place of its last token, others by their first's.
    """
    config = meta["config"]
    q, k = (jnp.asarray(inputs[f"in.{name}"]) for name in ("q", "k"))
    size, start, length = config["block_size"], config["prefill"], q.shape[1]
    groups = {"Qproj": "project", "Qavgproj": "average_project", "Qavg": "average", "Qorig": "each"}[config["q_pool"]]
    gate = BlockGate(
        config["Hq"],
        config["Hk"],
        config["D"],
        config["gate_hidden"],
        _pools(config["cls"]),
        groups=groups,
        qk_norm=config["qk_norm"],
    )
    rules = [same("attngate_linear_k.weight", "key_weight")]
    rules += [same("attngate_linear_q.weight", "query_weight")] if "attngate_linear_q.weight" in weights else []
    rules += [
        same(f"attngate_{a}norm.weight", f"{b}_norm/scale")
        for a, b in (("q", "query"), ("k", "key"))
        if config["qk_norm"]
    ]
    blocks = in_blocks(k, size)

    def both(module: BlockGate) -> Any:
        return module.queries(q), module.keys(*blocks)

    variables = params_of(gate, rules, weights, method=both)
    found: Any = gate.apply(variables, method=both)
    queries, keys = found
    count = keys.shape[1]
    first = size * jnp.arange(count)
    base, width = config.get("rope_theta", 10000.0), config["gate_hidden"]
    at_start = turned_halves(keys, *angles(first[None], width, base))
    at_end = turned_halves(keys, *angles(first[None] + size - 1, width, base))
    queries = turned_halves(queries, *angles(jnp.arange(length)[None], width, base))
    whole = (first + size)[None, :, None, None]
    stored = jnp.where(whole <= start, at_start, at_end)
    final = jnp.where(whole <= length, stored, 0)
    prefilled = -(-start // size)
    scores, budget, above = (np.full((length - start, len(q), config["Hk"], count), -1.0) for _ in range(3))
    for step, t in enumerate(range(start, length)):
        here = t // size + 1
        now = jnp.where(whole <= t + 1, stored, 0)[:, :here]
        logits: Any = gate.apply(variables, queries[:, t : t + 1], now, method="logits")
        share = np.asarray(jax.nn.softmax(logits[:, :, 0], axis=-1))
        scores[step, ..., :here], above[step, ..., :here] = share, share > config["threshold"]
        chosen = np.ones(share.shape, bool)
        if here > config["block_budget"]:
            chosen = np.zeros(share.shape, bool)
            np.put_along_axis(chosen, torch_top_k(share, config["block_budget"]), True, axis=-1)
        budget[step, ..., :here] = chosen
        budget[step, ..., here - 1] = above[step, ..., here - 1] = 1
    return {
        "out.k_compressed_prefill": jnp.where(whole <= start, at_start, 0)[:, :prefilled],
        "out.k_compressed_final": final,
        "out.gate_scores": scores,
        "out.mask_token_budget": budget,
        "out.mask_threshold": above,
    }
