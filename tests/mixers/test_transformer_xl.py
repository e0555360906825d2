"""Transformer-XL: the recurrence over segments, its gradient, and a model that carries its memory from piece to piece."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack, mixer_pattern

DIM, HEADS, SEGMENT, MEMORY, LENGTH = 8, 2, 4, 6, 14


def tokens(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def recurrent(params: Any, x: jax.Array, memory_length: int) -> jax.Array:
    """x [T, D], segment by segment: each reads itself and the memory, which has no gradient (arXiv:1901.02860, sec. 3)."""
    kernels = {name: leaf["kernel"] for name, leaf in (params["softmax"] | {"distance": params["distance"]}).items()}
    u, v = params["content_bias"], params["distance_bias"]

    def heads(a: jax.Array) -> jax.Array:
        return a.reshape(len(a), HEADS, -1)

    def wave(distance: int) -> np.ndarray:
        angle = distance * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
        return np.concatenate([np.sin(angle), np.cos(angle)]).astype(np.float32)

    memory, outs = jnp.zeros((0, DIM)), []
    for start in range(0, len(x), SEGMENT):
        segment = x[start : start + SEGMENT]
        context = jnp.concatenate([jax.lax.stop_gradient(memory), segment])
        q, k, values = (
            heads(segment @ kernels["query"]),
            heads(context @ kernels["key"]),
            heads(context @ kernels["value"]),
        )
        for i in range(len(segment)):
            last = len(memory) + i
            far = jnp.stack([heads((wave(last - j) @ kernels["distance"])[None])[0] for j in range(last + 1)])
            logits = jnp.einsum("nh,jnh->nj", q[i] + u, k[: last + 1]) + jnp.einsum("nh,jnh->nj", q[i] + v, far)
            weights = jax.nn.softmax(logits * (DIM // HEADS) ** -0.5)
            outs.append(jnp.einsum("nj,jnh->nh", weights, values[: last + 1]).reshape(-1) @ kernels["out"])
        memory = context[max(len(context) - memory_length, 0) :]
    return jnp.stack(outs)


@pytest.mark.parametrize("memory_length", [MEMORY, 0])
def test_a_sequence_read_at_once_is_the_recurrence_over_segments_gradient_included(memory_length: int) -> None:
    """Keys and values of a memory carry gradients to their projections, and none to what was remembered."""
    options = dict(num_heads=HEADS, segment_length=SEGMENT, memory_length=memory_length)
    mixer = MIXERS["transformer_xl"](embed_dim=DIM, **options)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
    params = cases.away_from_zero(jax.eval_shape(lambda: mixer.init(jax.random.key(1), x, tokens(LENGTH))), seed=1)
    cotangent = jax.random.normal(jax.random.key(2), (LENGTH, DIM))

    def found(params: Any, x: jax.Array) -> jax.Array:
        return (mixer.apply(params, x, tokens(LENGTH))[0][0] * cotangent).sum()

    def expected(params: Any, x: jax.Array) -> jax.Array:
        return (recurrent(params["params"], x[0], memory_length) * cotangent).sum()

    run = jax.jit(jax.value_and_grad(found, argnums=(0, 1)))(params, x)
    reference = jax.jit(jax.value_and_grad(expected, argnums=(0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), run, reference)  # float32, sums of 14 terms


def test_layers_of_attention_and_of_fourier_mixing_in_turns_carry_their_memory_over_segments() -> None:
    """FNetAR (arXiv:2107.10932): half of Transformer-XL's layers have no attention, and nothing else changes.

    A long text read segment by segment, each given the state that the one before left, gives what it gives read at once.
    """
    own = dict(num_heads=HEADS, segment_length=SEGMENT, memory_length=MEMORY)
    make = mixer_pattern(
        dict(kind="transformer_xl : fnet", transformer_xl=own, fnet=dict(num_samples=4, stride=2)), embed_dim=DIM
    )
    stack = Stack(make, 4, BlockOptions(mlp_dim=16))
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(1), x, tokens(LENGTH)))
    params = cases.away_from_zero(shapes, seed=1)
    layers = shapes["params"]["layers"]
    assert "softmax" in layers["block_0"]["mixer"] and "mixer" not in layers["block_1"]  # nothing is learned there
    apply = functools.partial(jax.jit(stack.apply), params)
    whole, state, pieces = apply(x, tokens(LENGTH))[0], stack.init_state(1, LENGTH, 1), []
    for start in range(0, LENGTH, SEGMENT):
        piece = slice(start, min(start + SEGMENT, LENGTH))
        out, state = apply(x[:, piece], tokens(LENGTH).part(piece), None, state)
        pieces.append(out)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=2e-5)  # float32, four layers
    kept = sum(leaf.size for leaf in jax.tree.leaves(stack.init_state(1, 100_000, 1)))
    assert kept < 1000  # of two rings of ten steps, and two of samples


def test_lengths_that_are_none_are_told() -> None:
    with pytest.raises(UsageError, match="segment_length=0 must be at least 1, and memory_length=64 at least 0"):
        MIXERS["transformer_xl"](embed_dim=DIM, segment_length=0).init(
            jax.random.key(0), jnp.zeros((1, 3, DIM)), tokens(3)
        )
