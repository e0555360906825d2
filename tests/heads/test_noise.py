"""Noise: drawn from a key it is what its name, its step and its key say; recorded it is what was recorded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.heads.noise import Drawn, Recorded


def test_names_steps_and_keys_give_other_noise_and_the_same_ones_the_same() -> None:
    source = Drawn(jax.random.key(0))
    sources = [source, source.fold_in(0), source.fold_in(1), source.fold_in(1).fold_in(0), Drawn(jax.random.key(1))]
    rows = [np.asarray(s.normal(name, (4,))) for s in sources for name in ("init", "step")]
    assert len({row.tobytes() for row in rows}) == len(rows)
    np.testing.assert_array_equal(rows[3], source.fold_in(0).normal("step", (4,)))


@pytest.mark.parametrize(
    ("kind", "mean", "variance"),
    [("normal", 0.0, 1.0), ("uniform", 0.5, 1 / 12), ("gumbel", np.euler_gamma, np.pi**2 / 6)],
)
def test_drawn_noise_has_the_mean_and_variance_of_its_kind(kind: str, mean: float, variance: float) -> None:
    values = getattr(Drawn(jax.random.key(0)), kind)("x", (40000,))
    assert float(values.mean()) == pytest.approx(mean, abs=5 * (variance / 40000) ** 0.5)
    assert float(values.var()) == pytest.approx(variance, rel=0.06)  # four deviations for the heaviest tail


@pytest.mark.parametrize("vocab_size", [1, 7, 37, 300])
def test_draws_have_their_probabilities_and_what_has_none_is_never_drawn(vocab_size: int) -> None:
    logits = 2 * jax.random.normal(jax.random.key(0), (vocab_size,)).at[1::5].set(-jnp.inf)
    drawn = Drawn(jax.random.key(1)).categorical("token", jnp.broadcast_to(logits, (200, 200, vocab_size)))
    counts, expected = np.bincount(drawn.ravel(), minlength=vocab_size), 40000 * np.asarray(jax.nn.softmax(logits))
    likely = expected > 0
    assert not counts[~likely].any()
    freedom = likely.sum() - 1
    chi_squared = (np.square(counts - expected)[likely] / expected[likely]).sum()
    assert chi_squared <= freedom + 5 * np.sqrt(2 * freedom)


def test_recorded_noise_is_read_at_the_steps_of_all_loops_around() -> None:
    arrays = {"init": jnp.arange(6.0).reshape(3, 2), "step": jnp.arange(24.0).reshape(3, 4, 2)}

    @jax.jit
    def read(noise: Recorded) -> tuple[jax.Array, jax.Array]:
        def inner(noise: Recorded, s: jax.Array) -> tuple[Recorded, jax.Array]:
            return noise, noise.fold_in(s).normal("step", (2,))

        def outer(noise: Recorded, k: jax.Array) -> tuple[Recorded, tuple[jax.Array, jax.Array]]:
            now = noise.fold_in(k)
            return noise, (now.normal("init", (2,)), jax.lax.scan(inner, now, jnp.arange(4))[1])

        return jax.lax.scan(outer, noise, jnp.arange(3))[1]

    init, step = read(Recorded(arrays))
    np.testing.assert_array_equal(init, arrays["init"])
    np.testing.assert_array_equal(step, arrays["step"])


def test_recorded_uniform_numbers_give_finite_gumbel_noise_even_at_their_bounds() -> None:
    uniform = jnp.asarray([0.0, 0.2, 0.7, 1.0])
    found = Recorded({"token": uniform}).gumbel("token", (4,))
    expected = [-np.log(20 * np.log(10)), -np.log(-np.log(0.2)), -np.log(-np.log(0.7)), 20 * np.log(10)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 logarithms
    np.testing.assert_array_equal(Recorded({"token": uniform}).uniform("token", (4,)), uniform)


def test_a_step_that_was_not_recorded_gives_nan() -> None:
    noise = Recorded({"step": jnp.ones((3, 2))})
    assert jnp.isnan(noise.fold_in(3).normal("step", (2,))).all()
    assert jnp.isnan(noise.fold_in(3).gumbel("step", (2,))).all()


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("step", (3,), r"'step' has shape \[5, 2\]; it must be \[steps, 3\]"),
        ("step", (5, 2), r"it must be \[steps, 5, 2\]"),
        ("scalar", (), r"it must be \[steps\]"),
        ("stop", (2,), "No noise 'stop' was recorded, only scalar, step"),
    ],
)
def test_noise_that_was_not_recorded_as_it_is_asked_for_is_refused(
    name: str, shape: tuple[int, ...], told: str
) -> None:
    noise = Recorded({"step": jnp.zeros((5, 2)), "scalar": jnp.zeros(())}).fold_in(0)
    with pytest.raises(UsageError, match=told):
        noise.normal(name, shape)
