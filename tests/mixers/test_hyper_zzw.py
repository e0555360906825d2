"""HyperZZW: its far branch is the sum that defines it, and blocks may have no residual."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.common.line import line_index
from ar_jax.mixers.hyper_zzw import _far
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.blocks import Block, BlockOptions


@pytest.mark.parametrize("segments", [[9], [4, 5]], ids=str)
def test_the_gated_kernel_is_convolved_with_the_past(segments: list[int]) -> None:
    rng, length = np.random.default_rng(0), sum(segments)
    k, v = rng.normal(size=(2, length, 3)), rng.normal(size=(2, length, 6))
    step = jnp.arange(length)[None]
    numbers = None if len(segments) == 1 else jnp.asarray(np.repeat(np.arange(len(segments)), segments))[None]
    tokens = Tokens(step, step[..., None], length, segment=numbers)
    far, _ = jax.jit(lambda k, v: _far(k, v, tokens, line_index(tokens), None))(jnp.float32(k), jnp.float32(v))
    expected, twice = np.zeros_like(v), np.tile(k, 2)
    for start, size in zip(np.cumsum([0, *segments]), segments, strict=False):
        for t in range(size):
            for lag in range(t + 1):
                expected[:, start + t] += twice[:, start + lag] * v[:, start + t - lag]
    np.testing.assert_allclose(far, expected, atol=1e-4)  # float32 Fourier transforms of sums of nine


def test_without_a_residual_nothing_passes_a_mixer_that_gives_nothing() -> None:
    def outputs(residual: str) -> jax.Array:
        block = Block(lambda: MIXERS["convolution"](8), BlockOptions(residual=residual, mlps="none"))
        x, step = jax.random.normal(jax.random.key(0), (1, 5, 8)), jnp.arange(5)[None]
        fed = x, Tokens(step, step[..., None], 5), None, None, True
        shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), *fed))
        return block.apply(jax.tree.map(lambda a: jnp.zeros(a.shape), shapes), *fed)[0]

    assert not outputs("none").any() and outputs("add").any()
    with pytest.raises(UsageError, match="residual='none' needs norm_first=True"):
        BlockOptions(residual="none", norm_first=False)
