from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError, build
from ar_jax.data.digits import load_digits
from ar_jax.tokenizers import TOKENIZERS
from ar_jax.tokenizers.resampling import area_matrix, resize

SIDES = (1, 2, 3, 5)


def pyramid(channels: int = 1, data_levels: int = 5, **options):
    kind = dict(kind="residual_pyramid", sides=SIDES) | options
    return build(TOKENIZERS, kind, "tokenizer", shape=(SIDES[-1], SIDES[-1], channels), data_levels=data_levels)


def images(channels: int = 1, levels: int = 5) -> jax.Array:
    """Smooth images of so many grey levels, without the jumps over the whole range that a residual cannot hold."""
    rough = jax.random.uniform(jax.random.key(0), (3, SIDES[-1], SIDES[-1], channels), minval=-1.0)
    return jnp.round((rough + 1) / 2 * (levels - 1)) / (levels - 1) * 2 - 1


def test_digits_come_back_exactly_through_their_tokens():
    data = load_digits().test.take(np.arange(60))["image"]
    tokenizer = TOKENIZERS["residual_pyramid"](shape=(8, 8, 1), data_levels=17)
    tokens = tokenizer.encode({}, jnp.asarray(data))
    assert tokens.shape == (60, 1 + 4 + 16 + 64) and 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size == 35
    np.testing.assert_allclose(tokenizer.decode({}, tokens), data, atol=1e-6)  # float32


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_fed_is_the_sum_of_the_coarser_scales_on_each_grid(channels):
    tokenizer, data = pyramid(channels), images(channels)
    tokens = tokenizer.encode({}, data)
    assert sum(int(np.prod(grid)) for grid in tokenizer.layout) == tokens.shape[1]
    slots = np.arange(tokens.shape[1])
    fed = tokenizer.resample({}, tokens, slots)
    assert fed.shape == (3, tokens.shape[1], tokenizer.resample_channels) and tokenizer.resample_channels == channels
    np.testing.assert_array_equal(fed[:, :channels], 0.0)
    finest = slots[-(SIDES[-1] ** 2) * channels :]
    blank = jnp.where(jnp.arange(tokens.shape[1])[None] < finest[0], tokens, (tokenizer.vocab_size - 1) // 2)
    before = tokenizer.preview({}, blank, jnp.ones_like(blank, bool))  # the middle level adds nothing
    seen = jnp.clip(fed[:, finest[0] :: channels], -1.0, 1.0).reshape(before.shape)
    np.testing.assert_allclose(seen, before, atol=1e-6)  # float32
    known = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] < finest[0], tokens.shape)
    np.testing.assert_allclose(tokenizer.preview({}, tokens, known), before, atol=1e-6)


def test_what_is_fed_depends_on_coarser_scales_only_and_can_be_asked_for_in_parts():
    tokenizer = pyramid()
    tokens = tokenizer.encode({}, images())
    starts = np.cumsum([0, *[side * side for side in SIDES]])
    whole = tokenizer.resample({}, tokens, np.arange(starts[-1]))
    for first, last in zip(starts, starts[1:], strict=False):
        changed = tokens.at[:, first:].set(0)
        part = tokenizer.resample({}, changed, np.arange(first, last))
        np.testing.assert_allclose(part, whole[:, first:last], atol=1e-6)  # float32
    np.testing.assert_allclose(tokenizer.resample({}, tokens, np.asarray([6, 2])), whole[:, [6, 2]], atol=1e-6)


def test_the_first_scale_is_the_mean():
    tokenizer = pyramid(data_levels=256)
    data = images(levels=256)
    coarse = tokenizer.resample({}, tokenizer.encode({}, data), np.asarray([1]))[:, 0]
    mean = resize(data, area_matrix(SIDES[-1], 1))[:, 0, 0]
    np.testing.assert_allclose(coarse, mean, atol=2 / 512)  # half a level


@pytest.mark.parametrize(
    ("options", "says"), [(dict(sides=(1, 2)), "sides"), (dict(sides=(2, 1, 5)), "sides"), (dict(levels=1), "levels")]
)
def test_wrong_options_are_told(options, says):
    with pytest.raises(UsageError, match=f"config.tokenizer.{says}"):
        pyramid(**options)
