"""The laws, over everything registered: training equals generation, the past does not see the future, parts combine."""

from __future__ import annotations

from typing import Any

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.feeds import FEEDS
from ar_jax.feeds.protocol import Chunk, Feed
from ar_jax.mixers import MIXERS
from ar_jax.models import BACKBONES
from ar_jax.models.generator import Context
from ar_jax.orders import ORDERS
from ar_jax.sampling.loop import walk
from ar_jax.system import System

BATCH = 2
# What a mixer reads is the same for every order; who may be read is the order's and the feed's affair: three mixers meet
# every order, the others the one with several tokens a step and queries that leave no trace.
READERS = ("softmax", "linear", "convolution")
CAUSAL = [(m, o, "auto", "decoder") for m in READERS for o in cases.ORDERS]
CAUSAL += [(m, "random, in sets", "auto", "decoder") for m in cases.CAUSAL_MIXERS if m not in READERS]
CAUSAL += [("softmax", o, f, "decoder") for o in cases.ORDERS for f in ("shift", "query")]
CAUSAL += [("softmax", o, "auto", "decoder, told the step") for o in ("raster", "random", "nearest", "next_scale")]
CAUSAL += [("softmax", o, "auto", "decoder, post-norm") for o in ("raster", "next_scale")]
CAUSAL += [("softmax", "raster", "auto", "decoder, no MLPs, grouped adaLN")]
CAUSAL += [("within and across steps", "next_scale", "auto", "decoder, MLP in every other layer")]
CAUSAL += [("softmax", o, "auto", "axial_transformer") for o in ("raster", "random", "random, in sets")]
CAUSAL += [("softmax", "random, in sets", "auto", "axial_transformer, three axes")]
CAUSAL += [("softmax", o, "shift", "block_transformer") for o in ("raster", "random, in sets")]
CAUSAL += [("linear", "raster", "shift", "block_transformer, summation")]
CAUSAL += [("softmax", "raster", "shift", "block_transformer, cross-attention")]
CAUSAL += [(m, "nearest", "neighbors", "decoder, two outputs") for m in ("softmax", "linear")]
CAUSAL += [("softmax", o, "nearby", "decoder") for o in ("spiral, outward", "patches", "nearest")]
CAUSAL += [("softmax", "raster", "merge", "decoder, drawing between layers")]
CAUSAL += [("softmax", "blocks", "merge", "decoder, shuffled tokens")]
CAUSAL += [("softmax", "random", "shift", "decoder, told the direction")]
CAUSAL += [("softmax", o, "shift", "perceiver_ar") for o in ("raster", "random, in sets")]
CAUSAL += [("softmax", "raster", "shift", f"perceiver_ar, {own}") for own in ("side by side", "own keys")]
CAUSAL += [("softmax", o, "query", "two_pass") for o in ("raster", "random, in sets", "nearest", "next_scale")]
MASKED = [
    (m, o, "mask", "decoder")
    for m in ("softmax", "softmax grouped, normed, biased")
    for o in ("random, in sets", "raster", "blocks")
]
MASKED += [(m, "random, in sets", "mask", "decoder") for m in cases.MIXERS if m not in cases.CAUSAL_MIXERS]
MASKED += [(m, "random, in sets", "recent", "decoder") for m in ("softmax", "linear")]
MASKED += [("softmax", o, "mask", b) for o in ("random, in sets", "blocks") for b in ("masked_autoencoder", "u_vit")]


FIRST = {row["kind"]: name for name, row in reversed(cases.MIXERS.items())}  # of several rows of a kind
LONG = {row for row in CAUSAL if row[2:] == ("auto", "decoder") and row[1] != "next_scale" and (
    row[0] not in FIRST.values() and ":" not in cases.MIXERS[row[0]]["kind"]
    or row[0] in READERS and row[1] not in ("raster", "random, in sets")
)}  # fmt: skip
LONG |= {
    row for row in CAUSAL if row[3] == "axial_transformer, three axes"
}  # see tests/models/test_axial_transformer.py


def in_long_tests(rows: list[tuple[str, str, str, str]]) -> list[Any]:
    """Further options of a mixer, and the orders that softmax reads anyway by feeds of their names, are for the long tests."""
    return [pytest.param(*row, marks=pytest.mark.slow) if row in LONG else row for row in rows]


def context_of(system: System, batch_size: int = BATCH) -> Context:
    """A drawn order and different classes."""
    return system.model.context(jax.random.key(2), batch_size, jnp.arange(batch_size, dtype=jnp.int32) % 3)


def by_rank(hidden: jax.Array, chunk: Chunk) -> jax.Array:
    """[B, n, D] hidden vectors of a chunk's targets, in the order of their ranks."""
    return chunk.pick(hidden)[:, np.argsort(np.asarray(chunk.answers))]


def test_every_registered_part_has_a_row() -> None:
    assert {row["kind"] for row in cases.MIXERS.values() if ":" not in row["kind"]} == set(MIXERS)
    assert {row["kind"] for row in cases.ORDERS.values()} == set(ORDERS)
    assert {"auto", *cases.FEEDS} == set(FEEDS)
    assert {row["kind"] for row in cases.BACKBONES.values()} == set(BACKBONES)


@pytest.mark.parametrize(("mixer", "order", "feed", "backbone"), in_long_tests(CAUSAL))
def test_any_cut_between_steps_gives_the_outputs_of_the_whole(mixer: str, order: str, feed: str, backbone: str) -> None:
    system = cases.tiny(mixer, order, feed, backbone)
    model, plan = system.model, system.model.feed
    half = len(plan.chunks) // 2

    @jax.jit
    def outputs(params: Any, values: jax.Array, context: Context) -> tuple[jax.Array, ...]:
        whole = by_rank(model.read(params, values, context, plan.parallel())[0], plan.parallel())

        def one_step(carry: Any, step: Any, chunk: Chunk) -> Any:
            state, out = carry
            hidden, state = model.read(params, values, context, chunk, state)
            return state, out.at[:, chunk.answers].set(chunk.pick(hidden))

        start = model.generator.decoder.init_state(BATCH, plan.max_len, plan.max_step_len)
        stepwise = walk(plan, one_step, (start, jnp.zeros_like(whole)))[1]
        state, halves = start, []
        for part in (plan.chunks[:half], plan.chunks[half:]):
            chunk = Feed(part).parallel()
            hidden, state = model.read(params, values, context, chunk, state)
            halves.append(by_rank(hidden, chunk))
        return whole, stepwise, jnp.concatenate(halves, axis=1)

    whole, stepwise, halves = outputs(cases.tiny_params(system), cases.tokens(system, BATCH), context_of(system))
    assert float(jnp.abs(whole - whole[:, :1]).max()) > 0.1  # the outputs do depend on what was read
    chex.assert_trees_all_close(stepwise, whole, atol=1e-4)  # float32, three layers of sums of 40 terms of order one
    chex.assert_trees_all_close(halves, whole, atol=1e-4)


@pytest.mark.parametrize(
    ("mixer", "order", "feed", "backbone"), in_long_tests([row for row in CAUSAL if row[0] in READERS]) + MASKED
)
def test_no_information_comes_from_the_same_or_a_later_step(mixer: str, order: str, feed: str, backbone: str) -> None:
    """By gradients: with all tokens embedded as floats, the answer for step k does not move with tokens of steps >= k."""
    system = cases.tiny(mixer, order, feed, backbone)
    model, params = system.model, cases.tiny_params(system)
    values, context = cases.tokens(system, BATCH), context_of(system)
    step_of_rank = np.repeat(np.arange(model.order.num_steps), model.order.sizes)

    @jax.jit
    def answers(values: jax.Array) -> jax.Array:
        """[B, L] log-probabilities of token 0, by rank: what is asked for does not enter but through the input."""

        def one_step(out: jax.Array, step: Any, chunk: Chunk) -> jax.Array:
            hidden, _ = model.read(params, values, context, chunk)
            ranks = jnp.where(chunk.answers >= 0, chunk.answers, len(step_of_rank))  # what only pads is dropped
            return out.at[:, ranks].set(model.ask(params, "__call__", chunk.pick(hidden))[..., 0], mode="drop")

        if not model.feed.remembers:
            return walk(model.feed, one_step, jnp.zeros(values.shape))
        chunk = model.feed.parallel()
        return model.ask(params, "__call__", by_rank(model.read(params, values, context, chunk)[0], chunk))[..., 0]

    def with_change(rank: jax.Array, change: jax.Array) -> jax.Array:
        return answers(values.at[jnp.arange(BATCH), context.slots[:, rank]].add(change) % 3)

    ranks = jnp.arange(model.order.length)
    same, moved = jax.vmap(jax.vmap(with_change, (0, None)), (None, 0))(ranks, jnp.arange(2))
    depends = np.asarray(jnp.abs(moved - same).max(axis=1) > 1e-5)  # [changed rank, answered rank]; rounding moves 1e-6
    allowed = step_of_rank[:, None] < step_of_rank[None, :]
    assert not (depends & ~allowed).any()
    assert depends[0, step_of_rank > 0].any() and (depends.sum() > 0.2 * allowed.sum())
