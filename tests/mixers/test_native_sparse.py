"""Native sparse attention and forget gates: what their special cases reduce to."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.analysis.flops import flops
from ar_jax.kernels.step_attention import step_attention
from ar_jax.kernels.step_attention.key_bias import forgotten, key_biased
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

DIM, LENGTH = 8, 14


def tokens(length: int, first: int = 0) -> Tokens:
    index = first + jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def test_with_all_blocks_and_all_in_the_window_two_branches_are_softmax_attention() -> None:
    mixer = MIXERS["native_sparse"](embed_dim=DIM, num_heads=2, num_kv_heads=1, block_size=4, num_blocks=9, window=99)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
    params = jax.jit(lambda x: mixer.init(jax.random.key(1), x, tokens(LENGTH)))(x)["params"]
    closed = jnp.where(jnp.arange(6) % 3 == 0, -1e9, 1e9)  # compression's gates shut, the others open
    gate = {"kernel": jnp.zeros_like(params["gate"]["kernel"]), "bias": closed}
    out = jax.jit(mixer.apply)({"params": params | {"gate": gate}}, x, tokens(LENGTH))[0]
    plain = MIXERS["softmax"](embed_dim=DIM, num_heads=2, num_kv_heads=1)
    same = {name: leaf for name, leaf in params.items() if name != "gate"}
    expected = jax.jit(plain.apply)({"params": same}, x, tokens(LENGTH))[0]
    np.testing.assert_allclose(out, 2 * expected, atol=1e-5)  # float32, sums of fourteen terms


def test_a_step_reads_chosen_blocks_and_their_means_not_all_keys() -> None:
    """Behind 64 times the context, a step costs what a mean for each block more does: 1 / block_size of attention's."""
    mixer = MIXERS["native_sparse"](embed_dim=DIM, num_heads=1, block_size=32, num_blocks=2, window=32)

    @functools.cache
    def count(context: int) -> int:
        state: Any = jax.eval_shape(lambda: mixer.init_state(1, context, 1))
        x = jax.ShapeDtypeStruct((1, 1, DIM), jnp.float32)
        params = jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, tokens(1)), x)
        return flops(lambda p, x, state: mixer.apply(p, x, tokens(1), state), params, x, state)

    dense = 4 * DIM * (65536 - 32768)  # two products of attention
    assert count(65536) - count(32768) < dense / 4


def test_forget_gates_decay_by_the_sum_of_their_logarithms_and_need_no_square_array() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, LENGTH, 2, 4)) for i in range(3))
    gates = -jax.random.uniform(jax.random.key(3), (1, LENGTH, 2))
    step = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    out = key_biased(step_attention, q, k, v, step, step, key_bias=-forgotten(gates, step))
    for head in range(2):
        for i in range(LENGTH):
            decay = [float(gates[0, j + 1 : i + 1, head].sum()) for j in range(i + 1)]
            weight = np.exp(np.asarray(k)[0, : i + 1, head] @ np.asarray(q)[0, i, head] / 2 + decay)
            expected = weight / weight.sum() @ np.asarray(v)[0, : i + 1, head]
            np.testing.assert_allclose(out[0, i, head], expected, atol=1e-5)  # float32, sums of fourteen terms

    def attend(x: jax.Array) -> jax.Array:
        step = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        return key_biased(step_attention, x, x, x, step, step, key_bias=x[..., 0].swapaxes(1, 2))

    for eqn in jax.make_jaxpr(attend)(jax.ShapeDtypeStruct((1, 4096, 2, 4), jnp.float32)).eqns:
        assert all(v.aval.size < 4096**2 for v in eqn.outvars)


def test_tokens_of_one_step_forget_together() -> None:
    gates = jnp.asarray([[[-1.0], [-2.0], [-4.0], [-8.0]]])
    found = forgotten(gates, jnp.asarray([[1, 0, 1, 2]]))
    np.testing.assert_array_equal(found[0, 0], [-7, -2, -7, -15])
