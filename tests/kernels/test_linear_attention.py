"""Linear attention: fast forms against the equation, in value, gradient and final state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from ar_jax.kernels.linear_attention import (
    FORMS,
    bidirectional_linear_attention,
    linear_attention,
    linear_attention_step,
)

FAST = sorted(set(FORMS) - {"reference"})
# float32: sums of 20 products of order one, in another order. bfloat16: q, k, v and outputs are rounded in both; the fast
# forms round each factor of a product anew, to 8 bits: 1/256 each, a few in a row.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
DECAYS = {"none": None, "head": "n", "token": "btn", "channel": "btnh", "strong token": "btn", "strong": "btnh"}
Sizes = tuple[int, int, int, int, int]  # B, T, N, H, E


def inputs(sizes: Sizes, decay: str, bonus: bool = False, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """Arguments; with a strong decay some tokens forget all but e^-30 of what came before."""
    batch, time, heads, dim, width = sizes
    r = np.random.default_rng(seed)
    tokens = {"q": (batch, time, heads, dim), "k": (batch, time, heads, dim), "v": (batch, time, heads, width)}
    args = {name: jnp.asarray(r.normal(size=shape), dtype) for name, shape in tokens.items()}
    args["initial_state"] = jnp.asarray(r.normal(size=(batch, heads, dim, width)), jnp.float32)
    if axes := DECAYS[decay]:
        log_decay = -r.uniform(0, 1, [dict(zip("btnh", tokens["q"], strict=True))[axis] for axis in axes])
        if decay.startswith("strong"):
            log_decay = np.where(r.random(log_decay.shape) < 0.4, -30.0, log_decay)
        args["log_decay"] = jnp.asarray(log_decay, jnp.float32)
    return args | ({"bonus": jnp.asarray(r.normal(size=(heads, dim)), jnp.float32)} if bonus else {})


def results(args: dict[str, Any], **options: Any) -> Any:
    """Outputs and final state, and the gradients of an uneven sum of both by all inputs."""

    def loss(args: dict[str, Any]) -> tuple[jax.Array, Any]:
        both = linear_attention(**args, **options)
        uneven = [(x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in both]
        return sum(uneven), both

    gradients, both = jax.grad(loss, has_aux=True)(args)
    return both, gradients


def assert_close(found: Any, right: Any, tolerance: float) -> None:
    """Relative to each array's largest number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max(initial=0)), rtol=0)


def check(args: dict[str, Any], dtype: str, implementation: str, chunk_size: int | None) -> None:
    found = jax.jit(functools.partial(results, implementation=implementation, chunk_size=chunk_size))(args)
    right = jax.jit(functools.partial(results, implementation="reference"))(args)
    assert found[0][0].dtype == dtype and found[0][1].dtype == jnp.float32
    assert_close(found, right, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking compiles for minutes
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(2, 20), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    chunk_size=st.sampled_from([None, 1, 4, 8]),
    decay=st.sampled_from(list(DECAYS)),
    bonus=st.booleans(),
    starts=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 1000),
)
def test_the_fast_forms_are_the_equation_in_value_gradient_and_state(
    implementation: str, sizes: Sizes, chunk_size: int, decay: str, bonus: bool, starts: bool, dtype: str, seed: int
) -> None:
    args = inputs(sizes, decay, bonus, seed, dtype)
    check(args | ({} if starts else {"initial_state": None}), dtype, implementation, chunk_size)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("decay", "bonus", "dtype"),
    [
        ("head", False, "float32"),
        ("strong token", False, "float32"),
        ("token", True, "bfloat16"),
        ("strong", True, "float32"),
        ("channel", False, "bfloat16"),
    ],
)
def test_each_decay_over_several_chunks(implementation: str, decay: str, bonus: bool, dtype: str) -> None:
    """Two chunks of 16 and a piece of a third: blocks of all sizes, and padding that must not decay."""
    check(inputs((1, 37, 2, 4, 3), decay, bonus, dtype=dtype), dtype, implementation, 16)


@pytest.mark.parametrize(("decay", "bonus"), [("channel", False), ("strong", True)])
def test_decays_per_channel_over_whole_tiles_of_a_tpu(decay: str, bonus: bool) -> None:
    """A chunk of 128 and a piece of another: blocks of sixteen tokens, with all levels inside of them and between them."""
    check(inputs((1, 150, 1, 4, 3), decay, bonus), "float32", "pallas_tpu", None)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_tpu_program_takes_some_of_the_heads(decay: str) -> None:
    """Six heads of 64 channels, two in 128 lanes, are three programs of two."""
    check(inputs((1, 6, 6, 64, 64), decay), "float32", "pallas_tpu", 4)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("bonus", [False, True])
def test_the_equation_is_the_one_of_the_docstring(implementation: str, bonus: bool) -> None:
    """In numpy, one token after the other."""
    args = inputs((2, 5, 2, 3, 4), "channel", bonus)
    q, k, v, log_decay, state = (np.asarray(args[n]) for n in ("q", "k", "v", "log_decay", "initial_state"))
    out, final = jax.jit(functools.partial(linear_attention, implementation=implementation))(**args)
    for t in range(5):
        before, written = state, k[:, t, :, :, None] * v[:, t, :, None, :]
        state = np.exp(log_decay[:, t])[..., None] * before + written
        read = before + np.asarray(args["bonus"])[None, :, :, None] * written if bonus else state
        np.testing.assert_allclose(out[:, t], np.einsum("bnhe,bnh->bne", read, q[:, t]), atol=1e-5)  # float32
    np.testing.assert_allclose(final, state, atol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("log_decay", [-30.0, -1000.0, -np.inf])
def test_any_decay_gives_finite_values_and_gradients(implementation: str, axes: int, log_decay: float) -> None:
    """exp of the sum of 40 decays of -30 is zero, and of its negative infinite: the quotient of the two must not be formed."""
    args = inputs((1, 40, 1, 3, 3), "none")
    args["log_decay"] = jnp.full(args["q"].shape[:axes], log_decay)
    (out, state), gradients = jax.jit(functools.partial(results, implementation=implementation))(args)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves((out, state, gradients)))
    own = jnp.einsum("btnh,btnh,btne->btne", args["q"], args["k"], args["v"])  # each token reads itself alone
    np.testing.assert_allclose(out, own, atol=1e-5)  # float32


@pytest.mark.parametrize("implementation", FAST)
def test_weak_decays_after_strong_ones_are_exact(implementation: str) -> None:
    """64 decays, one in two of -30: of their sum, near -1000, a float32 keeps 1/16000 of a nat."""
    r = np.random.default_rng(0)
    args = inputs((1, 64, 1, 4, 4), "none")
    args["log_decay"] = jnp.asarray(np.where(np.arange(64) < 32, -30.0, -r.random(64))[None, :, None], jnp.float32)
    found = jax.jit(functools.partial(linear_attention, implementation=implementation, chunk_size=64))(**args)
    right = jax.jit(functools.partial(linear_attention, implementation="reference"))(**args)
    assert_close(found, right, 2e-6)  # float32, sums of some ten products


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("decay", ["head", "strong"])
def test_the_state_continues_a_sequence(implementation: str, decay: str) -> None:
    args = inputs((2, 13, 2, 3, 4), decay, bonus=decay == "strong")
    attend = jax.jit(functools.partial(linear_attention, implementation=implementation, chunk_size=4))
    whole, last = attend(**args)
    state, pieces = args["initial_state"], []
    for piece in (slice(0, 6), slice(6, None)):
        part = {n: x[:, piece] if n in "qkv" or (n == "log_decay" and x.ndim > 1) else x for n, x in args.items()}
        out, state = attend(**part | {"initial_state": state})
        pieces.append(out)
    assert_close((jnp.concatenate(pieces, axis=1), state), (whole, last), 1e-5)  # float32


@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_step_is_one_token(decay: str, normalize: bool) -> None:
    args = inputs((2, 4, 2, 3, 5), decay, bonus=decay == "channel")
    args["initial_state"] = args["initial_state"][..., :4] if normalize else args["initial_state"]
    args["v"] = args["v"][..., :3] if normalize else args["v"]
    out, last = jax.jit(functools.partial(linear_attention, implementation="xla", normalize=normalize))(**args)
    step = jax.jit(functools.partial(linear_attention_step, normalize=normalize))
    state = args.pop("initial_state")
    for t in range(4):
        now = {n: x[:, t] if n in "qkv" or (n == "log_decay" and x.ndim > 1) else x for n, x in args.items()}
        found, state = step(**now, state=state)
        assert_close(found, out[:, t], 1e-5)  # float32
    assert_close(state, last, 1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_normalizing_averages_the_values(implementation: str) -> None:
    """The weights of what is read add up to one, so values that are all the same come out as they went in."""
    args = inputs((2, 11, 2, 3, 4), "token")
    args |= {"q": jnp.abs(args["q"]), "k": jnp.abs(args["k"]), "v": jnp.full((2, 11, 2, 4), 3.0), "initial_state": None}
    attend = functools.partial(linear_attention, normalize=True, implementation=implementation, chunk_size=4)
    out, state = jax.jit(attend)(**args)
    assert state.shape == (2, 2, 3, 5)
    np.testing.assert_allclose(out, 3.0, atol=1e-5)  # float32
    keys = attend(**args | {"v": jnp.ones((2, 11, 2, 1))})[1][..., 0]
    np.testing.assert_allclose(state[..., -1], keys, atol=1e-5)


def test_normalizing_by_nothing_is_finite() -> None:
    args = inputs((1, 3, 1, 2, 2), "none")
    out, _ = linear_attention(**args | {"q": jnp.zeros((1, 3, 1, 2)), "initial_state": None}, normalize=True)
    np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_bidirectional_form_reads_every_key_that_is_not_masked(normalize: bool) -> None:
    args = inputs((2, 7, 2, 3, 4), "none")
    q, k, v = (jnp.abs(args[name]) for name in "qkv")
    q, mask = q[:, :5], jnp.asarray(np.random.default_rng(0).random((2, 7)) < 0.6)
    weights = jnp.einsum("btnh,bsnh->btns", q, k) * mask[:, None, None]
    weights = weights / weights.sum(-1, keepdims=True) if normalize else weights
    out = bidirectional_linear_attention(q, k, v, normalize=normalize, key_mask=mask)
    np.testing.assert_allclose(out, jnp.einsum("btns,bsne->btne", weights, v), rtol=1e-5)  # float32, 7 products


def test_a_kernel_works_on_each_devices_part() -> None:
    """Batch and heads over four devices."""
    args = inputs((2, 5, 2, 4, 4), "strong", bonus=True)
    attend = functools.partial(results, implementation="pallas_tpu", chunk_size=4)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(attend)(args)
    assert_close(found, jax.jit(attend)(args), 1e-5)  # float32


def test_a_kernel_is_mapped_over_an_axis() -> None:
    args = inputs((1, 5, 2, 4, 4), "head")
    attend = functools.partial(results, implementation="pallas_tpu", chunk_size=4)
    twice = jax.jit(jax.vmap(attend))(jax.tree.map(lambda x: jnp.stack([x / 2, x]), args))
    assert_close(jax.tree.map(lambda x: x[1], twice), jax.jit(attend)(args), 1e-5)  # float32


def test_the_backward_pass_keeps_memory_linear_in_time() -> None:
    """Temporary bytes of the gradient at 512 tokens and at 2048: four times as many, not sixteen."""

    def temporary(time: int) -> int:
        args = inputs((1, time, 2, 16, 16), "token")
        return (
            jax.jit(functools.partial(results, implementation="xla"))
            .lower(args)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporary(2048) < 4.5 * temporary(512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 5, 2))}, "should be"),
        ({"k": jnp.zeros((2, 5, 2, 4))}, "should be"),
        ({"v": jnp.zeros((2, 4, 2, 4))}, "should be"),
        ({"log_decay": jnp.zeros(3)}, r"log_decay \(3,\) should be \[N\]"),
        ({"log_decay": jnp.zeros((2, 5))}, "log_decay"),
        ({"bonus": jnp.zeros(3)}, r"bonus \(3,\) should be \[N, H\] = \(2, 3\)"),
        ({"initial_state": jnp.zeros((2, 2, 4, 3))}, r"should be \[B, N, H, E\] = \(2, 2, 3, 4\)"),
        ({"normalize": True}, r"should be \[B, N, H, E\] = \(2, 2, 3, 5\)"),
        ({"chunk_size": 12}, "should be a power of two"),
        ({"implementation": "xl"}, "Did you mean 'xla'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**inputs((2, 5, 2, 3, 4), "token") | changes)


def test_steps_and_keys_that_do_not_fit_are_refused() -> None:
    zeros = jnp.zeros
    with pytest.raises(ValueError, match=r"should be \[B, N, H\]"):
        linear_attention_step(zeros((2, 3, 4)), zeros((2, 3, 4)), zeros((2, 2, 4)), zeros((2, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"log_decay \(4,\) should be \[N\]"):
        args = [zeros((2, 3, 4))] * 3
        linear_attention_step(*args, zeros((2, 3, 4, 4)), log_decay=zeros(4))
    with pytest.raises(ValueError, match=r"should be \[B, T, N, H\], \[B, S, N, H\]"):
        bidirectional_linear_attention(zeros((2, 3, 1, 4)), zeros((2, 5, 2, 4)), zeros((2, 5, 2, 4)))
    with pytest.raises(ValueError, match=r"key_mask float32 \(2, 5\) should be bool"):
        args = [zeros((2, 5, 1, 4))] * 3
        bidirectional_linear_attention(*args, key_mask=zeros((2, 5)))
