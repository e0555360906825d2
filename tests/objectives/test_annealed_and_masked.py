"""How orders are annealed (RAR), and how many tokens are masked (MaskGIT, MAR)."""

from __future__ import annotations

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.config import UsageError
from ar_jax.objectives.masked import SCHEDULES, Masked


def test_random_orders_fade_to_the_models_own() -> None:
    """All are random until half of the training, none from three quarters on (RAR's 200th and 300th of 400 epochs)."""
    system = cases.tiny(objective__kind="permuted", objective__anneal_start=0.5, objective__anneal_end=0.75)
    params, batch = cases.tiny_params(system), {"tokens": cases.tokens(system, 2), "label": jnp.asarray([0, 1])}
    loss = jax.jit(lambda progress, key: system.loss(params, batch, key, progress)[:2])
    rates = [float(loss(jnp.float32(p), jax.random.key(0))[1]["shuffled_fraction"]) for p in (0, 0.5, 0.6, 0.75, 0.99)]
    np.testing.assert_allclose(rates, [1, 1, 0.6, 0, 0], atol=1e-6)
    early, late = ({float(loss(jnp.float32(p), jax.random.key(s))[0]) for s in range(3)} for p in (0, 0.99))
    assert len(early) == 3  # another order, another loss
    assert len(late) < 3  # only whether a class is withheld is left to chance


@pytest.mark.parametrize("least", [0.0, 0.7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_share_of_masked_tokens_lies_between_the_least_and_all(schedule: str, least: float) -> None:
    share = np.asarray(SCHEDULES[schedule](jnp.linspace(0, 1, 101), least))
    assert share.min() >= least - 1e-6 and share.max() <= 1 + 1e-6
    assert share.max() - share.min() > 0.9 * (1 - least)


def test_mars_share_is_a_normal_distribution_cut_off() -> None:
    draws = np.linspace(0.01, 0.99, 50)
    expected = stats.truncnorm((0.7 - 1) / 0.25, 0, loc=1, scale=0.25).ppf(draws)
    np.testing.assert_allclose(SCHEDULES["truncated_normal"](jnp.asarray(draws), 0.7), expected, atol=1e-5)  # float32


def test_a_least_share_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match="least_masked"):
        Masked(least_masked=1.0)


def test_a_blank_that_is_a_token_may_be_drawn_but_is_never_left_in_a_sample() -> None:
    """As MaskGIL's code has it; here the blank is by far the likeliest of all."""
    system = cases.tiny("softmax", "random, in sets", "mask", model__blank_token=True)
    vocab, params = system.tokenizer.vocab_size, cases.tiny_params(system)
    bias = params["generator"]["head"]["logits"]["bias"]
    assert bias.shape == (vocab + 1,) and "blank" not in params["generator"]
    params["generator"]["head"]["logits"]["bias"] = bias.at[vocab].set(100.0)
    drawn = system.sample(params, jax.random.key(0), jnp.zeros(2, jnp.int32), jnp.zeros(2, bool), system.drawing())
    assert (np.asarray(drawn) == vocab - 1).all()
