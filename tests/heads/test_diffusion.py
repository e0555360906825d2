"""The diffusion head: parity with the official one, and what its own options do."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ar_jax.config import UsageError
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.noise import Drawn, Recorded
from ar_jax.heads.protocol import Sampling
from ar_jax.interop.mar import head_rules
from ar_jax.interop.transfer import to_official, to_ours

FIXTURES = Path(os.environ.get("AR_JAX_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))
TINY = Diffusion(channels=3, depth=2, width=16, num_sampling_steps=3, train_steps=20, batch_multiplier=2)
OFFICIAL = Diffusion(channels=4, depth=2, width=48, num_sampling_steps=60, batch_multiplier=2)
PREFIX = "diffloss.net."


@functools.cache
def official() -> tuple[dict[str, np.ndarray], Any, dict[str, np.ndarray]]:
    """The official head's weights, as ours, and its inputs and outputs."""
    folder = FIXTURES / "visual" / "mar"
    if not folder.is_dir():
        pytest.skip("the official fixtures are not here; name their folder in AR_JAX_FIXTURES")
    weights = {k: v for k, v in load_file(folder / "weights.safetensors").items() if k.startswith(PREFIX)}
    converted = to_ours(head_rules(2, PREFIX, "network/"), weights, fresh(OFFICIAL)["params"])
    return weights, {"params": converted.params}, load_file(folder / "io.safetensors")


def fresh(head: Diffusion) -> Any:
    """The parameters' shapes."""
    hidden, target = jnp.zeros((1, 1, 48)), jnp.zeros((1, 1, head.channels))
    return jax.eval_shape(
        functools.partial(head.init, method="loss"), jax.random.key(0), hidden, target, jax.random.key(0)
    )


def test_official_weights_come_and_go_bit_for_bit() -> None:
    weights, params, _ = official()
    again = to_official(head_rules(2, PREFIX, "network/"), params["params"])
    assert set(again) == set(weights)
    for key, value in weights.items():
        np.testing.assert_array_equal(again[key], value)


def test_the_network_is_the_official_one() -> None:
    _, params, io = official()
    out = jax.jit(OFFICIAL.apply)(params, io["in.net_c"], io["in.net_x"], io["in.net_t"].astype(np.int32))
    np.testing.assert_allclose(out, io["out.net"], atol=1e-5)  # float32, four times its sensitivity to rounding


def test_both_terms_of_the_loss_are_the_official_ones() -> None:
    _, params, io = official()
    target = np.moveaxis(io["in.latents"], 1, -1).reshape(2, 16, 4)
    terms = jax.jit(functools.partial(OFFICIAL.apply, method="terms"))
    step, noise = io["in.t"].reshape(2, 2, 16).astype(np.int32), io["in.loss_noise"].reshape(2, 2, 16, 4)
    squared, bits = terms(params, io["out.z"], target, step, noise)
    np.testing.assert_allclose(squared.reshape(-1), io["out.loss_mse"], atol=2e-5)  # float32, as above
    # The first step's bits are of the difference of two numbers near one another.
    np.testing.assert_allclose(bits.reshape(-1), io["out.loss_vb"], atol=1e-5, rtol=3e-5)
    mask = io["in.mask"]
    loss = ((squared + bits).mean(axis=0) * mask).sum() / mask.sum()
    assert float(loss) == pytest.approx(float(io["out.loss"]), abs=2e-6)


# What the official sampler (60 steps, temperature 0.9) makes of the fixture's z and noise at two of the tokens.
SAMPLES = {
    (0, 3): ([-0.568063, -0.29837126, 0.79123044, 0.03453168], [-1.0776535, -0.5871765, 1.4123528, 0.00846411]),
    (1, 15): ([-0.94026744, 0.25999218, 0.11321204, -0.16711926], [-1.5284108, -0.15852918, 0.39738616, -0.32193857]),
}


@pytest.mark.parametrize("guided", [False, True])
def test_the_sampler_is_the_official_one(guided: bool) -> None:
    _, params, io = official()
    noise = Recorded({"init": io["in.noise_init"], "step": io["in.noise_steps"]})
    sample = jax.jit(functools.partial(OFFICIAL.apply, method="sample"))
    branch = (io["out.z_uncond"], 2.0) if guided else ()
    drawn = sample(params, io["out.z"], noise, Sampling(temperature=0.9), *branch)
    for token, expected in SAMPLES.items():
        np.testing.assert_allclose(drawn[token], expected[guided], atol=2e-5)  # float32 after 60 steps


@functools.cache
def tiny_params() -> Any:
    """Parameters of a fresh TINY head for hidden vectors in R^8."""
    hidden, target = jnp.zeros((1, 1, 8)), jnp.zeros((1, 1, 3))
    return jax.jit(functools.partial(TINY.init, method="loss"))(jax.random.key(0), hidden, target, jax.random.key(0))


def test_a_fresh_head_predicts_no_noise_and_halfway_variances() -> None:
    """The squared error is then that of the noise itself, 1 on average."""
    hidden, target, many = jnp.ones((40, 50, 8)), jnp.zeros((40, 50, 3)), (2, 40, 50)

    @jax.jit
    def run(params: Any, key: jax.Array) -> Any:
        step = jax.random.randint(key, many, 0, 20)
        noise = jax.random.normal(key, (*many, 3))
        terms = TINY.apply(params, hidden, target, step, noise, method="terms")
        drawn = TINY.apply(params, hidden, target, jax.random.key(3), method="loss")
        return TINY.apply(params, hidden[None], noise, step), noise, terms, drawn

    out, noise, (squared, bits), drawn = run(tiny_params(), jax.random.key(1))
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_allclose(squared, jnp.square(noise).mean(axis=-1), rtol=1e-5)  # float32, sums of three
    assert drawn.shape == (40, 50) and drawn.dtype == jnp.float32
    # Five deviations of the difference of two means: of the squares of 12000 numbers, and of what the steps cost.
    deviation = float((2 * (2 / 3 + bits.var()) / 4000) ** 0.5)
    assert float(drawn.mean()) == pytest.approx(float(1 + bits.mean()), abs=5 * deviation)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_gradients_and_samples_are_finite_in_float32_whatever_the_networks_dtype(dtype: Any) -> None:
    head = TINY.clone(dtype=dtype)
    hidden, target = (jax.random.normal(jax.random.key(i), (2, 5, n)) for i, n in enumerate((8, 3)))
    key, draws = jax.random.key(2), np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + 0.1 * draws.normal(size=a.shape).astype(np.float32), tiny_params())

    @jax.jit
    def run(params: Any, hidden: jax.Array) -> Any:
        loss = functools.partial(head.apply, method="loss")
        value, gradient = jax.value_and_grad(lambda p: loss(p, hidden, target, key).mean())(params)
        return value, head.apply(params, hidden, Drawn(key), Sampling(), method="sample"), gradient

    value, drawn, gradient = run(params, hidden.astype(dtype))
    assert value.dtype == drawn.dtype == jnp.float32 and drawn.shape == target.shape
    for leaf in jax.tree.leaves((value, drawn, gradient)):
        assert jnp.isfinite(leaf).all() and (leaf != 0).any()


def test_temperature_zero_leaves_only_the_initial_noise() -> None:
    init, steps = jnp.ones((1, 2, 3)), np.random.default_rng(0).normal(size=(2, 3, 1, 2, 3)).astype(np.float32)
    sample = jax.jit(functools.partial(TINY.apply, method="sample"))
    cold, warm = (
        [
            sample(tiny_params(), jnp.ones((1, 2, 8)), Recorded({"init": init, "step": s}), Sampling(temperature=t))
            for s in steps
        ]
        for t in (0.0, 1.0)
    )
    np.testing.assert_array_equal(*cold)
    assert (warm[0] != warm[1]).all()


def test_there_is_no_likelihood() -> None:
    params = {"params": {}}
    with pytest.raises(UsageError, match="no exact log-likelihood; evaluate its loss"):
        TINY.apply(params, jnp.zeros((1, 1, 8)), jnp.zeros((1, 1, 3)), method="log_prob")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"depth": 0}, "config.head.depth=0 must be at least 1"),
        ({"width": 0}, "config.head.width=0"),
        ({"batch_multiplier": 0}, "config.head.batch_multiplier=0"),
        ({"num_sampling_steps": 1}, "num_sampling_steps=1 must lie between 2 and train_steps=1000"),
        ({"num_sampling_steps": 1001}, "num_sampling_steps=1001"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(option: dict[str, int], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Diffusion(channels=3, **option)
