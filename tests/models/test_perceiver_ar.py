"""Perceiver AR: layers run over the latents alone, and a hundred thousand inputs fit."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import mixer_pattern
from ar_jax.models.perceiver_ar import PerceiverAR

DIM = 16
MIXERS = mixer_pattern(dict(kind="softmax", num_heads=2), embed_dim=DIM)


def model_of(**fields: Any) -> PerceiverAR:
    sizes: dict[str, Any] = {"num_layers": 1, "num_latents": 64} | fields
    return PerceiverAR(DIM, MIXERS, BlockOptions(mlp_dim=32), MIXERS, **sizes)


def tokens_of(length: int, first: int, count: int) -> Tokens:
    """All remembered, `count` of them asked from `first` on."""
    step = jnp.arange(length, dtype=jnp.int32)[None]
    asked = (step >= first) & (step < first + count)
    return Tokens(step, step[..., None], length, asked=asked, num_asked=count)


def step_of(model: PerceiverAR, length: int, count: int) -> tuple[Any, Any, Any]:
    """A gradient step's work, and the shapes of its arguments."""
    tokens = tokens_of(length, length - count, count)
    x = jax.ShapeDtypeStruct((1, length, DIM), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, tokens), x)
    return jax.value_and_grad(lambda params, x: jnp.square(model.apply(params, x, tokens)[0]).sum()), params, x


def test_layers_cost_what_the_latents_cost_and_inputs_one_cross_attention() -> None:
    """Two further layers cost the same over 1024 and over 4096 inputs; all the rest grows in proportion to the inputs."""
    lengths = (1024, 2048, 4096)
    one = {length: flops(*step_of(model_of(num_layers=1), length, 64)) for length in lengths}
    three = {length: flops(*step_of(model_of(num_layers=3), length, 64)) for length in lengths[::2]}
    assert three[1024] - one[1024] == three[4096] - one[4096] > 0
    assert one[4096] - one[2048] == pytest.approx(2 * (one[2048] - one[1024]), rel=0.01)


def test_a_hundred_thousand_inputs_are_trained_in_little_memory() -> None:
    """The compiled step holds a few arrays of [100000, 16] (6 MiB each), and none of latents by inputs (24 MiB a head)."""
    step, params, x = step_of(model_of(), 100_000, 64)
    memory = jax.jit(step).lower(params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 120 * 2**20


def test_latents_read_all_inputs_up_to_their_own_and_only_asked_tokens_have_some() -> None:
    model, length, first, count = model_of(), 12, 5, 3
    tokens, x = tokens_of(length, first, count), jax.random.normal(jax.random.key(0), (1, length, DIM))
    params = jax.jit(lambda x: model.init(jax.random.key(1), x, tokens))(x)
    reads = jax.jit(jax.jacobian(lambda x: jnp.square(model.apply(params, x, tokens)[0])[0, :, 0]))(x)
    seen = np.abs(reads[:, 0]).max(axis=-1) > 1e-9
    index = np.arange(length)
    asked = (index >= first) & (index < first + count)
    np.testing.assert_array_equal(seen, (index[:, None] >= index) & asked[:, None])


def test_the_layers_state_holds_the_last_latents_alone() -> None:
    model = model_of()
    short, long = (jax.eval_shape(lambda n=n: model.init_state(2, n, 1)) for n in (128, 1024))
    assert jax.tree.map(jnp.shape, short.layers) == jax.tree.map(jnp.shape, long.layers)
    assert long.inputs[0].k.shape == (2, 2, 1024, DIM // 2) and long.layers[0][0][0].k.shape[2] == 64


def test_a_run_of_answers_is_trained_with_keys_that_inputs_alone_have() -> None:
    """Where all tokens are asked, as when parameters are made, none is an input alone: their norm was missing then."""
    given = {"feed": "shift", "objective": dict(kind="next_token", num_answers=4), "model__input_dropout_rate": 0.2}
    system = cases.tiny.__wrapped__(backbone="perceiver_ar, own keys", **given)
    params, values = jax.eval_shape(system.init, jax.random.key(0)), jnp.zeros((2, 9), jnp.int32)

    def loss(params: Any) -> jax.Array:
        return system.objective(system.model, params, values, values[:, 0], jax.random.key(0), jnp.zeros(()))[0]

    assert jax.tree.structure(jax.eval_shape(jax.grad(loss), params)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__query="mlp"), "model.query='mlp' is unknown"),
        (dict(model__mixer=dict(kind="linear")), "needs the mixer 'softmax' without a window"),
        (dict(model__cross_after=(0, 9)), r"cross_after=\(0, 9\) must lie between 0 and num_layers=2"),
        (dict(model__num_latents=0), "num_latents=0 and latents_per_token=1 must be at least 1"),
        (dict(model__query="identity", model__decoder_dim=8), "need latents as wide as inputs"),
        (
            dict(model__own_keys=True, model__decoder_dim=0, model__latents_per_token=2),
            "own_keys needs latents_per_token=1",
        ),
        (dict(model__adaln="block"), "needs config.model.adaln='none'"),
        (dict(objective=dict(kind="next_token", num_answers=-1)), "num_answers=-1 must be at least 0"),
    ],
)
def test_what_latents_cannot_do_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cases.tiny.__wrapped__(backbone="perceiver_ar", **changes)
