"""What every mixer promises beyond the laws of order: padding, packed segments, bfloat16 and gradients."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import build
from ar_jax.mixers import MIXERS
from ar_jax.mixers.common.statistics import is_statistic
from ar_jax.mixers.protocol import NEVER, Mixer, Tokens

DIM, LENGTH, BATCH = 16, 9, 2
SEEDS = {"select_and_pack": 2}  # with the usual one the gate chooses no token, and nothing has a gradient
NAMES = [name for name, row in cases.MIXERS.items() if ":" not in row["kind"]]
FIRST = {row["kind"]: name for name, row in reversed(cases.MIXERS.items())}  # of several rows of a kind
every_mixer = pytest.mark.parametrize("name", NAMES)
one_of_each_kind = pytest.mark.parametrize(
    "name", [n if n in FIRST.values() else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)


def mixer_of(name: str, **fields: Any) -> Any:
    given = {"embed_dim": DIM, "position_axes": 2, "grid": (3, 3), "num_rows": LENGTH} | fields
    return build(MIXERS, cases.MIXERS[name], "model.mixer", **given)


def tokens_of(length: int, **changes: Any) -> Tokens:
    """In raster order on a grid of rows of three, or all in one step where everything reads everything."""
    index = jnp.arange(length, dtype=jnp.int32)[None]
    position = jnp.stack([index // 3, index % 3], axis=-1)
    return Tokens(index, position, length, row=index).replace(**changes)


@functools.cache
def variables_of(name: str) -> Any:
    """Parameters that are all away from zero."""
    mixer, x = mixer_of(name), jnp.zeros((1, LENGTH, DIM))
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), x, tokens_of(LENGTH)))
    return cases.away_from_zero(shapes, seed=SEEDS.get(name, 1))


def mix(mixer: Mixer, variables: Any, x: jax.Array, tokens: Tokens) -> jax.Array:
    return jax.jit(lambda variables, x: mixer.apply(variables, x, tokens)[0])(variables, x)  # type: ignore[attr-defined]


def inputs(length: int = LENGTH, seed: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((BATCH, length, DIM), np.float32))


@every_mixer
def test_padding_is_read_by_nobody(name: str) -> None:
    mixer, variables, x = mixer_of(name), variables_of(name), inputs()
    kept = LENGTH - 3
    step = jnp.where(jnp.arange(LENGTH) < kept, jnp.arange(LENGTH), NEVER)[None]
    padded = mix(mixer, variables, x.at[:, kept:].set(100.0), tokens_of(LENGTH, step=step, padded=True))
    whole = mix(mixer, variables, x[:, :kept], tokens_of(kept))
    np.testing.assert_allclose(padded[:, :kept], whole, atol=2e-5)  # float32, sums of a few terms
    assert np.isfinite(np.asarray(padded)).all()


@every_mixer
def test_packed_segments_do_not_read_one_another(name: str) -> None:
    mixer, variables, x = mixer_of(name), variables_of(name), inputs()
    cut = 4
    index = jnp.arange(LENGTH)
    place = jnp.where(index < cut, index, index - cut)[None]
    position = jnp.stack([place // 3, place % 3], axis=-1)
    packed = tokens_of(LENGTH, segment=(index >= cut).astype(jnp.int32)[None], position=position, row=place, step=place)
    together = mix(mixer, variables, x, packed)
    apart = [mix(mixer, variables, part, tokens_of(part.shape[1])) for part in (x[:, :cut], x[:, cut:])]
    np.testing.assert_allclose(together, np.concatenate(apart, axis=1), atol=2e-5)  # float32, sums of a few terms


@one_of_each_kind
def test_bfloat16_is_float32_rounded(name: str) -> None:
    x, variables = inputs(), variables_of(name)
    exact = mix(mixer_of(name), variables, x, tokens_of(LENGTH))
    rounded = mix(mixer_of(name, dtype=jnp.bfloat16), variables, x.astype(jnp.bfloat16), tokens_of(LENGTH))
    assert rounded.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rounded, np.float32) - exact).mean() / np.abs(exact).mean()
    assert error < 0.05  # 8 bits of mantissa, through a handful of products


@one_of_each_kind
def test_every_parameter_has_a_finite_gradient(name: str) -> None:
    mixer, x = mixer_of(name), inputs()
    cotangent = jax.random.normal(jax.random.key(3), x.shape)

    @jax.jit
    @jax.grad
    def gradient(variables: Any) -> jax.Array:
        return (mixer.apply(variables, x, tokens_of(LENGTH))[0] * cotangent).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables_of(name)).get("params", {})):
        if is_statistic(jax.tree_util.keystr(path, simple=True, separator="/")):
            continue
        assert np.isfinite(np.asarray(leaf)).all() and np.asarray(leaf).any(), jax.tree_util.keystr(path)
