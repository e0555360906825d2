"""SeerAttention: which blocks are read, what a step reads, and a gate that learns while nothing else moves."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.common.block_gate import POOLS, angles, turned_halves
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.from_softmax import from_softmax
from ar_jax.training.paths import named_leaves
from ar_jax.training.state import create_state
from ar_jax.training.step import make_train_step

DIM, LENGTH, SIZE = 8, 11, 3

tiny = cases.tiny.__wrapped__  # what is not hashable cannot be kept


def tokens(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize(("num_blocks", "threshold"), [(2, 0.0), (4, 0.3)])
def test_a_token_reads_its_block_and_those_of_the_largest_gates(num_blocks: int, threshold: float) -> None:
    fields: dict[str, Any] = dict(num_blocks=num_blocks, threshold=threshold, block_size=SIZE, groups="average_project")
    mixer = MIXERS["seer_attention"](embed_dim=DIM, num_heads=1, rope_base=0, **fields)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
    (out, _), variables = jax.jit(lambda x: mixer.init_with_output(jax.random.key(1), x, tokens(LENGTH)))(x)
    params = variables["params"]
    kernels = {name: np.asarray(leaf["kernel"]) for name, leaf in params["softmax"].items()}
    q, k, v = (np.asarray(x[0]) @ kernels[name] for name in ("query", "key", "value"))
    cos, sin = angles(jnp.arange(LENGTH)[None], DIM, 10000.0)
    asked = turned_halves((q @ params["gate"]["query_weight"][0])[None, :, None], cos, sin)[0, :, 0]
    for t in range(LENGTH):
        own, gates = t // SIZE, []
        for b in range(own + 1):
            block = k[b * SIZE : (b + 1) * SIZE]
            pooled = np.concatenate([block.max(axis=0), block.min(axis=0), block.mean(axis=0)])
            key = (pooled @ params["gate"]["key_weight"][0])[None, None, None]
            start = slice(b * SIZE, b * SIZE + 1)
            gates.append(float(turned_halves(key, cos[:, start], sin[:, start])[0, 0, 0] @ asked[t]) / np.sqrt(DIM))
        if (t + 1) % SIZE:
            gates[own] = 0.0
        gate = softmax(np.asarray(gates))
        best = [b for b in np.argsort(-gate[:own])[: num_blocks - 1] if gate[b] >= threshold]
        read = [j for j in range(t + 1) if j // SIZE in (*best, own)]
        expected = softmax(k[read] @ q[t] / np.sqrt(DIM)) @ v[read] @ kernels["out"]
        np.testing.assert_allclose(out[0, t], expected, atol=1e-5)  # float32, sums of eleven terms


def test_a_step_reads_the_chosen_blocks_and_not_the_cache() -> None:
    """Behind a longer context a step costs a gate for each block more, not a key for each token."""
    mixer = MIXERS["seer_attention"](embed_dim=DIM, num_heads=1, block_size=64, num_blocks=2, gate_dim=4)

    @functools.cache
    def count(context: int) -> int:
        state: Any = jax.eval_shape(lambda: mixer.init_state(1, context, 1))
        x = jax.ShapeDtypeStruct((1, 1, DIM), jnp.float32)
        params = jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, tokens(1)), x)
        return flops(lambda p, x, state: mixer.apply(p, x, tokens(1), state)[0], params, x, state)

    dense = 4 * DIM * (65536 - 32768)  # two products of attention
    assert count(65536) - count(32768) < dense / 4


def test_distillation_trains_the_gate_and_leaves_all_else_to_the_bit() -> None:
    plain = tiny("softmax", model__mixer=dict(kind="softmax", num_heads=2))
    mixer = dict(kind="seer_attention", num_heads=2, block_size=2, num_blocks=2, dense=True)
    system = tiny("softmax", model__mixer=mixer, objective=dict(kind="gate_distillation"))
    optimizer = optax.adamw(0.03)
    state = jax.jit(lambda: create_state(system, optimizer, 0, False))()
    trained = from_softmax(cases.tiny_params(plain), state.params)
    state = state.replace(params=jax.tree.map(jnp.asarray, trained))
    step = jax.jit(make_train_step(system, optimizer, lambda _: 0.03, seed=0, num_steps=40))
    batch = {
        "image": jax.random.uniform(jax.random.key(0), (8, 3, 3, 1), minval=-1.0),
        "label": jnp.zeros(8, jnp.int32),
    }
    told = []
    for _ in range(40):
        state, metrics = step(state, batch)
        told.append(float(metrics["gate_divergence"]))
    old, new = named_leaves(trained), named_leaves(state.params)
    for name, leaf in new.items():
        moves = "/mixer/gate/" in name or name.endswith("divergence")
        assert np.array_equal(old[name], leaf) != moves, name
    assert 0 < told[-1] < 0.7 * told[1]  # the first is told before anything was measured


def test_pools_take_what_there_is() -> None:
    block = jnp.asarray([[[[[1.0]], [[3.0]], [[100.0]]]]])
    there = jnp.asarray([[[True, True, False]]])[..., None, None]
    assert [float(POOLS[pool](block, there)[0, 0, 0, 0]) for pool in ("max", "min", "avg")] == [3, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(threshold=1.0), r"threshold=1.0 in \[0, 1\)"),
        (dict(groups="sum"), "'sum' is unknown"),
        (dict(groups="each", gate_dim=4), "gate_dim=4 must be head_dim=8"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MIXERS["seer_attention"](embed_dim=DIM, num_heads=1, **fields).init(
            jax.random.key(0), jnp.zeros((1, 3, DIM)), tokens(3)
        )
