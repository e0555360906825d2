"""Attention at two resolutions: exact pairs, means elsewhere, the budget, and the claimed cost."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.kernels.multiresolution import multiresolution
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

LENGTH, SIZE = 10, 4


def arrays() -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (1, LENGTH, 1, 3)) for i in range(3)]


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("num_blocks", [2, 9])
def test_pairs_are_exact_within_the_budget_and_means_or_nothing_elsewhere(num_blocks: int, mode: str) -> None:
    options = {"num_blocks": num_blocks, "block_size": SIZE, "mode": mode}
    found = jax.jit(functools.partial(multiresolution, **options))(*arrays())[0, :, 0]
    q, k, v = (np.asarray(a)[0, :, 0] for a in arrays())
    parts = [slice(start, start + SIZE) for start in range(0, LENGTH, SIZE)]
    means = [[a[part].mean(axis=0) for part in parts] for a in (q, k)]
    coarse = np.asarray(means[0]) @ np.asarray(means[1]).T / np.sqrt(3)
    score = coarse - coarse.max(axis=1, keepdims=True)
    exact = np.argsort(-score.reshape(-1))[:num_blocks]
    weight = np.zeros((LENGTH, LENGTH))
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            if 3 * i + j in exact:
                weight[rows, columns] = np.exp(q[rows] @ k[columns].T / np.sqrt(3))
            elif mode == "full":
                weight[rows, columns] = np.exp(coarse[i, j])
    total = weight.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        found, weight @ v / np.where(total > 0, total, 1), atol=1e-5
    )  # float32, sums of ten terms


def test_segments_that_share_a_block_do_not_mix() -> None:
    q, k, v = arrays()
    segment = (jnp.arange(LENGTH) >= 6).astype(jnp.int32)[None]
    run = jax.jit(functools.partial(multiresolution, num_blocks=4, block_size=SIZE))
    first = run(q, k, v, None, segment)
    later = (jnp.arange(LENGTH) >= 6)[None, :, None, None]
    other = run(q, k, v + 5.0 * later, None, segment)
    np.testing.assert_allclose(other[:, :6], first[:, :6], atol=1e-6)  # float32
    assert np.abs(other[:, 6:] - first[:, 6:]).max() > 1


def test_flops_are_those_of_the_pairs_of_blocks() -> None:
    """With a budget in proportion to the length, and blocks of 32, the means' logits are all that is quadratic."""

    @functools.cache
    def count(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        return flops(functools.partial(multiresolution, num_blocks=4 * length // 32), x, x, x)

    assert count(2048) < 2.3 * count(1024)
    dense = 4 * 16 * 2048**2
    assert count(2048) < dense / 2


def test_what_does_not_fit_is_told() -> None:
    index = jnp.arange(3)[None]
    for fields, message in ((dict(mode="half"), "'half' is unknown"), (dict(num_blocks=0), "at least 1")):
        with pytest.raises(UsageError, match=message):
            MIXERS["multiresolution"](embed_dim=8, **fields).init(
                jax.random.key(0), jnp.zeros((1, 3, 8)), Tokens(index, index[..., None], 3)
            )
