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

DIM, SIZE = 8, 3

tiny = cases.tiny.__wrapped__  # what is not hashable cannot be kept


def tokens(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("size", [SIZE, 64, 128])
@pytest.mark.parametrize(("num_blocks", "threshold"), [(2, 0.0), (4, 0.3)], ids=["budget", "threshold"])
def test_a_token_reads_its_block_and_those_of_the_largest_gates(num_blocks: int, threshold: float, size: int) -> None:
    fields: dict[str, Any] = dict(num_blocks=num_blocks, threshold=threshold, block_size=size, groups="average_project")
    length = 4 * size - 1
    mixer = MIXERS["seer_attention"](embed_dim=DIM, num_heads=1, rope_base=0, **fields)
    x = jax.random.normal(jax.random.key(0), (1, length, DIM))
    (out, _), variables = jax.jit(lambda x: mixer.init_with_output(jax.random.key(1), x, tokens(length)))(x)
    params = variables["params"]
    kernels = {name: np.asarray(leaf["kernel"]) for name, leaf in params["softmax"].items()}
    q, k, v = (np.asarray(x[0]) @ kernels[name] for name in ("query", "key", "value"))
    cos, sin = angles(jnp.arange(length)[None], DIM, 10000.0)
    asked = turned_halves((q @ params["gate"]["query_weight"][0])[None, :, None], cos, sin)[0, :, 0]
    read_less = 0
    for t in sorted({*range(0, length, max(length // 11, 1)), size - 1, length - 1}):
        own, gates = t // size, []
        for b in range(own + 1):
            block = k[b * size : (b + 1) * size]
            pooled = np.concatenate([block.max(axis=0), block.min(axis=0), block.mean(axis=0)])
            key = (pooled @ params["gate"]["key_weight"][0])[None, None, None]
            start = slice(b * size, b * size + 1)
            gates.append(float(turned_halves(key, cos[:, start], sin[:, start])[0, 0, 0] @ asked[t]) / np.sqrt(DIM))
        if (t + 1) % size:
            gates[own] = 0.0
        gate = softmax(np.asarray(gates))
        best = [b for b in np.argsort(-gate[:own])[: num_blocks - 1] if gate[b] >= threshold]
        read = [j for j in range(t + 1) if j // size in (*best, own)]
        expected = softmax(k[read] @ q[t] / np.sqrt(DIM)) @ v[read] @ kernels["out"]
        np.testing.assert_allclose(out[0, t], expected, atol=1e-5)  # float32, weights that sum to one
        read_less += len(best) < min(own, num_blocks - 1)
    assert (read_less > 0) == (threshold > 0)  # the budget is always used up, the threshold leaves some of it


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


def moved(mixer: Any, context: int) -> float:
    """Bytes that the operations of a step read and write behind a context, whose state is written over, by XLA's count.

    Without fusions: XLA takes one that gathers a few rows of an array to read all of it.
    """
    x = jax.ShapeDtypeStruct((1, 1, DIM), jnp.float32)
    state: Any = jax.eval_shape(lambda: mixer.init_state(1, context, 1))
    params = jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, tokens(1)), x)
    step = jax.jit(lambda p, x, state: mixer.apply(p, x, tokens(1), state), donate_argnums=2)
    compiled = step.lower(params, x, state).compile({"xla_disable_hlo_passes": "fusion,fusion-wrapper"})
    return compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize(("size", "num_blocks", "threshold"), [(64, 4, 0.0), (128, 4, 0.3)])
def test_a_step_moves_the_chosen_blocks_and_of_the_cache_nothing_else(
    size: int, num_blocks: int, threshold: float
) -> None:
    """Behind twice the context it moves what the gate knows of further blocks, and no further key or value."""
    fields: dict[str, Any] = dict(num_blocks=num_blocks, threshold=threshold, block_size=size)
    sparse = MIXERS["seer_attention"](embed_dim=DIM, num_heads=1, **fields)
    dense = MIXERS["softmax"](embed_dim=DIM, num_heads=1)
    keys_and_values = 2 * DIM * 4 * 16384
    assert moved(dense, 32768) - moved(dense, 16384) > keys_and_values
    assert moved(sparse, 32768) - moved(sparse, 16384) < keys_and_values / 8  # some numbers of each block
    assert moved(sparse, 32768) < moved(dense, 32768) / 8


def test_blocks_that_are_not_chosen_are_not_read_while_sampling() -> None:
    """Not a number times zero would be not a number."""
    size, length = 64, 300
    mixer = MIXERS["seer_attention"](embed_dim=DIM, num_heads=1, block_size=size, num_blocks=2)
    x = jax.random.normal(jax.random.key(0), (1, length, DIM))
    state = mixer.init_state(1, length, 1)
    variables = jax.jit(mixer.init)(jax.random.key(1), x[:, :1], tokens(1))
    step = jax.jit(lambda x, piece, state: mixer.apply(variables, x, piece, state))
    _, state = step(x[:, :-1], tokens(length).part(slice(0, length - 1)), state)
    last = x[:, -1:], tokens(length).part(slice(length - 1, length))

    def without(block: int) -> jax.Array:
        line = state.line.replace(
            **{n: getattr(state.line, n).at[:, :, block * size : (block + 1) * size].set(jnp.nan) for n in "kv"}
        )
        return step(*last, state.replace(line=line))[0]

    expected = step(*last, state)[0]
    same = [bool((without(block) == expected).all()) for block in range(5)]
    assert same.count(True) == 3 and not same[-1]  # two are read, its own among them


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
