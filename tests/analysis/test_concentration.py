"""Entropy and spectral gap of attention, and that Linear Log-Normal attention has those of softmax attention."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.concentration import concentration, fit_log_normal, linear_weights, softmax_weights
from ar_jax.config import UsageError
from ar_jax.mixers.common.feature_maps import FEATURE_MAPS, LOG_NORMAL_FIT, matched_moments

TOKENS, WIDTH = 256, 64


def test_attention_to_oneself_to_one_for_all_and_to_all_are_told_apart() -> None:
    """Little entropy comes with any gap; the gap says whether all read the same."""
    own, all_alike = np.eye(8), np.ones((8, 8)) / 8
    same = np.zeros((8, 8))
    same[:, 3] = 1
    measured = [concentration(weights) for weights in (own, same, all_alike)]
    np.testing.assert_allclose([m.entropy_bits for m in measured], [0, 0, 3], atol=1e-9)  # float64
    np.testing.assert_allclose([m.spectral_gap for m in measured], [0, 1, 1], atol=1e-6)  # of a defective eigenvalue
    assert concentration(np.stack([own, same])).spectral_gap == pytest.approx(0.5)
    for wrong, message in ((np.ones((3, 4)), "should be square"), (np.eye(3) * 2, "rows with a sum of 1")):
        with pytest.raises(UsageError, match=message):
            concentration(wrong)


@pytest.mark.parametrize("spread", [0.7, 1.0])
def test_log_normal_attention_concentrates_as_softmax_attention_does(spread: float) -> None:
    """With matched moments; the same features of unmatched queries and keys, and elu + 1, hardly concentrate."""
    random = np.random.default_rng(0)
    q, k = (random.normal(size=(TOKENS, WIDTH)) * spread for _ in range(2))
    softmax = concentration(softmax_weights(q, k))
    assert softmax.log_variance == pytest.approx(spread**4, rel=0.1)  # Gaussian logits of that variance
    alpha, beta = (float(a) for a in matched_moments(jnp.float32(q.std()), jnp.float32(k.std())))

    def of(name: str, q: np.ndarray, k: np.ndarray) -> tuple[float, float]:
        features = [np.asarray(FEATURE_MAPS[name](jnp.asarray(a, jnp.float32))) for a in (q, k)]
        measured = concentration(linear_weights(*features))
        return measured.log_variance, measured.entropy_bits

    variance, entropy = of("exp", alpha * q, beta * k)
    assert variance == pytest.approx(softmax.log_variance, rel=0.25)  # the fit is a line through a curve
    apart = abs(entropy - softmax.entropy_bits)
    for other in (of("exp", q, k), of("elu", q, k)):
        assert other[0] < softmax.log_variance / 5 and other[1] - softmax.entropy_bits > 1.5 * apart


def test_the_published_fit_is_that_of_heads_of_64_channels() -> None:
    slope, offset = fit_log_normal(64)
    assert slope == pytest.approx(LOG_NORMAL_FIT[0], rel=0.1) and offset == pytest.approx(LOG_NORMAL_FIT[1], abs=0.1)
    assert fit_log_normal(16)[0] > 1.2 * slope  # of fewer terms a sum is spread wider
