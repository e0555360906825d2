"""Combiner: its factorised expectation, full support, and the claimed cost."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

DIM, LENGTH, WIDTH = 4, 11, 3


def tokens(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def regions(kind: str, n: int) -> tuple[list[int], list[list[int]]]:
    """The tokens that token n reads one by one, and the regions that it reads as a whole."""
    if kind == "fixed":
        start = n // WIDTH * WIDTH
        return list(range(start, n + 1)), [list(range(b, b + WIDTH)) for b in range(0, start, WIDTH)]
    if kind == "axial":
        start = n // WIDTH * WIDTH
        columns = [list(range(c, start, WIDTH)) for c in range(WIDTH)] if start else []
        return list(range(start, n + 1)), columns
    blocks, end = [], 0
    for bit in reversed(range(n.bit_length())):
        if n >> bit & 1:
            blocks.append(list(range(end, end + (1 << bit))))
            end += 1 << bit
    return [n], blocks


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("kind", ["fixed", "logsparse", "axial"])
def test_each_token_reads_tokens_nearby_and_abstractions_of_all_others(kind: str) -> None:
    mixer = MIXERS["combiner"](embed_dim=DIM, num_heads=1, factorization=kind, width=WIDTH, rope_base=0)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, DIM))
    (out, _), variables = jax.jit(lambda x: mixer.init_with_output(jax.random.key(1), x, tokens(LENGTH)))(x)
    kernels = {name: np.asarray(leaf["kernel"]) for name, leaf in variables["params"].items()}
    q, k, v = (np.asarray(x[0]) @ kernels[name] for name in ("query", "key", "value"))
    for n in range(LENGTH):
        direct, whole = regions(kind, n)
        assert sorted(direct + sum(whole, [])) == list(range(n + 1))
        keys, values = [k[j] for j in direct], [v[j] for j in direct]
        for region in whole:
            keys.append(k[region].max(axis=0))
            values.append(softmax(k[region] @ q[region].max(axis=0) / np.sqrt(DIM)) @ v[region])
        expected = softmax(np.stack(keys) @ q[n] / np.sqrt(DIM)) @ np.stack(values) @ kernels["out"]
        np.testing.assert_allclose(out[0, n], expected, atol=1e-5)  # float32, sums of eleven terms


@pytest.mark.parametrize(("kind", "power"), [("fixed", 1.5), ("axial", 1.5), ("logsparse", 1.0)])
def test_flops_grow_as_claimed(kind: str, power: float) -> None:
    """T sqrt(T) where a width is the root of the length; T log T, which is between slopes 1 and 1.2 here."""
    mixer = MIXERS["combiner"](embed_dim=DIM, num_heads=1, factorization=kind)

    @functools.cache
    def count(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, DIM), jnp.float32)
        params: Any = jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, tokens(length)), x)
        return flops(lambda params, x: mixer.apply(params, x, tokens(length))[0], params, x)

    slope = np.log2(count(16384) / count(4096)) / 2
    assert power - 0.1 < slope < power + (0.2 if kind == "logsparse" else 0.03)


def test_what_does_not_fit_is_told() -> None:
    for fields, message in ((dict(factorization="strided"), "'strided' is unknown"), (dict(width=0), "width=0 must")):
        with pytest.raises(UsageError, match=message):
            MIXERS["combiner"](embed_dim=DIM, num_heads=1, **fields).init(
                jax.random.key(0), jnp.zeros((1, 3, DIM)), tokens(3)
            )
