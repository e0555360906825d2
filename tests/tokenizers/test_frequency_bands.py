"""Bands of frequency: what a low pass keeps, and that the steps of NFIG are bands, from low to high."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import get_config
from ar_jax.data.digits import load_digits
from ar_jax.data.protocol import Facts
from ar_jax.system import from_config
from ar_jax.tokenizers.resampling import band_cutoffs, low_pass
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid

SIDES = (1, 2, 4, 8)


def test_bands_are_as_wide_as_their_grids_have_cells() -> None:
    """sigma_i = sigma_(i-1) + h_i w_i / sum_j h_j w_j sigma_max (arXiv:2503.07076, sec. 3.2)."""
    np.testing.assert_allclose(band_cutoffs((1, 2, 4)), np.asarray([1, 5, 21]) / 21)


def test_a_low_pass_keeps_slow_waves_and_takes_out_fast_ones() -> None:
    row = np.arange(8) * 2 * np.pi / 8
    slow, fast = np.cos(row)[:, None] + 0 * row, np.cos(3 * row)[None] + 0 * row[:, None]
    x = jnp.asarray(slow + fast, jnp.float32)[None, :, :, None]
    half = low_pass(x, 0.4)  # 0.4 sqrt(1/2) lies between 1/8 and 3/8
    np.testing.assert_allclose(half[0, :, :, 0], slow, atol=1e-5)  # float32, sums of 64
    np.testing.assert_array_equal(low_pass(x, 1.0), x)
    noise = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    mean = jnp.broadcast_to(noise.mean(axis=(1, 2), keepdims=True), noise.shape)
    np.testing.assert_allclose(low_pass(noise, 0.0), mean, atol=1e-5)


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_the_first_scales_tell_the_low_frequencies_of_an_image_and_little_of_the_others(scale: int) -> None:
    """Of the digits, what scales 0..k add up to lies nearer to the bands 0..k than VAR's sums do; the whole is exact."""
    images = jnp.asarray(load_digits().test.take(np.arange(60))["image"])
    aim = low_pass(images, band_cutoffs(SIDES)[scale])
    known = jnp.arange(85) < np.cumsum(np.square(SIDES))[scale]
    far = []
    for bands in (True, False):
        tokenizer = ResidualPyramid((8, 8, 1), 17, SIDES, frequency_bands=bands)
        tokens = tokenizer.encode({}, images)
        shown = tokenizer.preview({}, tokens, jnp.broadcast_to(known[None], tokens.shape))
        far.append(float(jnp.square(shown - aim).mean()))
        np.testing.assert_allclose(tokenizer.decode({}, tokens), images, atol=1e-6)  # float32
    assert far[0] <= far[1] if scale == 0 else far[0] < 0.9 * far[1]


def test_an_image_takes_one_evaluation_for_each_band() -> None:
    """Ten bands of 680 codes in all, in 10 evaluations of a network of 310M parameters (their table 2)."""
    facts = Facts("image", (256, 256, 3), 256, tuple(map(str, range(1000))))
    made = from_config(get_config("configs/nfig.py:d16"), facts)
    assert made.model.step_sizes == (1, 4, 9, 16, 25, 36, 64, 100, 169, 256) and len(made.model.feed.chunks) == 10
    assert made.tokenizer.network.quantizer.frequency_bands and made.model.feed.resampled
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(made.model.init, jax.random.key(0))))
    assert round(size / 1e6) == 310


def test_what_is_fed_for_a_band_is_what_the_bands_before_have_given_and_no_more() -> None:
    """Tokens of a band and of later ones do not change what the network is given for it."""
    made = from_config(get_config("configs/nfig.py:smoke"), Facts("image", (8, 8, 1), 17, tuple("0123456789")))
    tokens = made.tokenizer.encode({}, jnp.asarray(load_digits().test.take(np.arange(3))["image"]))
    starts = np.cumsum([0, *np.square(SIDES)])
    for first, last in zip(starts, starts[1:], strict=False):
        slots, changed = np.arange(first, last), tokens.at[:, first:].set(0)
        fed = made.tokenizer.resample({}, tokens, slots)
        np.testing.assert_array_equal(made.tokenizer.resample({}, changed, slots), fed)
        assert fed.any() == (first > 0)
