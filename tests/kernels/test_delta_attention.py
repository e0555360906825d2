"""Delta rules: fast forms against the equation, in value, gradient and final state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ar_jax.kernels.delta_attention import (
    DPLR_FORMS,
    FORMS,
    delta_attention,
    delta_attention_step,
    dplr_attention,
    dplr_attention_step,
)

FAST = sorted(set(FORMS) - {"reference"})
# float32: sums of 20 products of order one, in another order; the inverse of a chunk's triangular matrix multiplies a few.
# bfloat16: q, k and v are rounded in both; Pallas rounds each factor of a product anew, to 8 bits: 1/256 each, a few in a row.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}
ARRAYS = {"delta": ("q", "k", "v", "beta", "log_decay"), "dplr": ("q", "k", "v", "a", "b", "log_decay")}
OPS = {"delta": delta_attention, "dplr": dplr_attention}


def inputs(op: str, sizes: tuple[int, ...], decay: str, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """Arguments of "delta" or "dplr"; `decay` is "none", "head", "token", "channel" or "strong", which forgets now and then."""
    batch, time, heads, dim, width = sizes
    r = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k, key = (r.normal(size=(batch, time, heads, dim)) for _ in range(3))
    args = {"q": q, "k": unit(k), "v": r.normal(size=(batch, time, heads, width))}
    rate = r.uniform(0, 1, (batch, time, heads, dim))
    shape = (batch, time, heads) if op == "delta" and decay != "channel" else (batch, time, heads, dim)
    args |= {"beta": rate[..., 0] * 1.5} if op == "delta" else {"a": -unit(key), "b": unit(key) * rate}
    log_decay = -r.uniform(0, 1, (heads,) if decay == "head" else shape)
    if decay == "strong":
        log_decay = np.where(r.random(shape) < 0.3, -30.0, log_decay)
    args |= {"log_decay": log_decay, "initial_state": r.normal(size=(batch, heads, dim, width))}
    low = ("q", "k", "v", "a", "b")
    arrays = {name: jnp.asarray(x, dtype if name in low else "float32") for name, x in args.items()}
    return arrays | ({"log_decay": None} if decay == "none" else {})


def results(op: str, args: dict[str, Any], **options: Any) -> Any:
    """Outputs and final state, and the gradients of an uneven sum of both by all inputs."""

    def loss(args: dict[str, Any]) -> tuple[jax.Array, Any]:
        both = OPS[op](**args, **options)
        uneven = [(x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in both]
        return sum(uneven), both

    gradients, both = jax.grad(loss, has_aux=True)(args)
    return both, gradients


def assert_close(found: Any, right: Any, tolerance: float) -> None:
    """Relative to each array's largest number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max(initial=0)), rtol=0)


def check(op: str, args: dict[str, Any], implementation: str, chunk_size: int | None, dtype: str) -> None:
    fast = functools.partial(results, op, implementation=implementation, chunk_size=chunk_size)
    found = jax.jit(fast)(args)
    right = jax.jit(functools.partial(results, op, implementation="reference"))(args)
    assert found[0][0].dtype == dtype and found[0][1].dtype == jnp.float32
    assert_close(found, right, TOLERANCE[dtype])


SIZES = st.tuples(st.integers(1, 2), st.integers(2, 20), st.integers(1, 2), st.integers(1, 5), st.integers(1, 6))
DRAWN = {
    "sizes": SIZES,
    "chunk_size": st.sampled_from([None, 1, 4, 8]),
    "seed": st.integers(0, 1000),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
}
few = functools.partial(
    settings, deadline=None, derandomize=True, phases=[Phase.generate]
)  # shrinking compiles for minutes


@pytest.mark.parametrize("implementation", FAST)
@few(max_examples=4)
@given(decay=st.sampled_from(["none", "head", "token", "strong"]), starts=st.booleans(), **DRAWN)
def test_the_fast_forms_of_the_delta_rule_are_its_equation(
    implementation: str, sizes: Any, chunk_size: int | None, seed: int, dtype: str, decay: str, starts: bool
) -> None:
    args = inputs("delta", sizes, decay, seed, dtype)
    check("delta", args | ({} if starts else {"initial_state": None}), implementation, chunk_size, dtype)


@pytest.mark.parametrize("implementation", sorted(set(DPLR_FORMS) - {"reference"}))
@few(max_examples=3)
@given(decay=st.sampled_from(["channel", "strong"]), **DRAWN)
def test_the_fast_forms_of_the_low_rank_rule_are_its_equation(
    implementation: str, sizes: Any, chunk_size: int | None, seed: int, dtype: str, decay: str
) -> None:
    check("dplr", inputs("dplr", sizes, decay, seed, dtype), implementation, chunk_size, dtype)


@pytest.mark.parametrize("op", OPS)
def test_several_chunks_and_heads_in_a_program_are_the_equation(op: str) -> None:
    """Four heads of 32 channels fill the lanes of one TPU program, and 20 tokens are three chunks, the last half empty."""
    args = inputs(op, (1, 20, 4, 32, 32), "strong", dtype="bfloat16")
    check(op, args, "pallas_tpu", 8, "bfloat16")


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_the_delta_rule_is_the_one_of_the_docstring(implementation: str, decay: str) -> None:
    """In numpy, one token after the other."""
    args = inputs("delta", (2, 5, 2, 3, 4), decay)
    q, k, v, beta, log_decay, state = (np.asarray(args[n]) for n in (*ARRAYS["delta"], "initial_state"))
    if implementation in DPLR_FORMS or decay == "token":
        out, final = jax.jit(functools.partial(delta_attention, implementation=implementation))(**args)
        for t in range(5):
            decays = np.exp(log_decay[:, t])
            state = (decays[..., None, None] if decay == "token" else decays[..., None]) * state
            difference = v[:, t] - np.einsum("bnhe,bnh->bne", state, k[:, t])
            state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * difference[:, :, None, :]
            np.testing.assert_allclose(out[:, t], np.einsum("bnhe,bnh->bne", state, q[:, t]), atol=1e-5)  # float32
        np.testing.assert_allclose(final, state, atol=1e-5)


@pytest.mark.parametrize("implementation", DPLR_FORMS)
def test_the_low_rank_rule_is_the_one_of_the_docstring(implementation: str) -> None:
    """In numpy, one token after the other, with the transition as a matrix."""
    args = inputs("dplr", (2, 5, 2, 3, 4), "channel")
    q, k, v, a, b, log_decay, state = (np.asarray(args[n]) for n in (*ARRAYS["dplr"], "initial_state"))
    out, final = jax.jit(functools.partial(dplr_attention, implementation=implementation))(**args)
    for t in range(5):
        transition = np.exp(log_decay[:, t])[..., None] * np.eye(3) + b[:, t, :, :, None] * a[:, t, :, None, :]
        state = transition @ state + k[:, t, :, :, None] * v[:, t, :, None, :]
        np.testing.assert_allclose(out[:, t], np.einsum("bnhe,bnh->bne", state, q[:, t]), atol=1e-5)  # float32
    np.testing.assert_allclose(final, state, atol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("op", OPS)
def test_any_decay_gives_finite_values_and_gradients(op: str, implementation: str) -> None:
    """exp of the sum of 40 decays of -1000 is zero, and of its negative infinite: their quotient must not be formed."""
    if op == "dplr" and implementation not in DPLR_FORMS:
        pytest.skip(f"dplr_attention has no {implementation} form")
    args = inputs(op, (1, 40, 1, 3, 3), "token" if op == "delta" else "channel")
    args |= {"log_decay": jnp.full_like(args["log_decay"], -1000.0)}
    args |= {} if op == "delta" else {"a": 0.0 * args["a"]}
    (out, state), gradients = jax.jit(functools.partial(results, op, implementation=implementation))(args)
    assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves((out, state, gradients)))
    beta = args.get("beta", jnp.ones(args["q"].shape[:3]))
    own = jnp.einsum("btnh,btnh,btne,btn->btne", args["q"], args["k"], args["v"], beta)
    np.testing.assert_allclose(out, own, atol=1e-5)  # float32; each token reads itself alone


@pytest.mark.parametrize("implementation", FORMS)
def test_a_repeated_key_answers_with_the_last_value(implementation: str) -> None:
    """(I + L)^-1 has ones and zeros here, where powers of L, summed for an inverse, would reach 10^18 in 64 tokens."""
    r = np.random.default_rng(0)
    v = jnp.asarray(r.normal(size=(1, 64, 1, 4)), jnp.float32)
    k = jnp.broadcast_to(jnp.array([0.6, 0.8])[None, None, None], (1, 64, 1, 2))
    attend = functools.partial(delta_attention, implementation=implementation)
    out, _ = jax.jit(attend)(k, k, v, jnp.ones((1, 64, 1)))
    np.testing.assert_allclose(out, v, atol=1e-5)  # float32


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("op", OPS)
def test_the_state_continues_a_sequence(op: str, implementation: str) -> None:
    if op == "dplr" and implementation not in DPLR_FORMS:
        pytest.skip(f"dplr_attention has no {implementation} form")
    args = inputs(op, (2, 13, 2, 3, 4), "strong")
    attend = jax.jit(functools.partial(OPS[op], implementation=implementation, chunk_size=4))
    whole, last = attend(**args)
    state, pieces = args["initial_state"], []
    for piece in (slice(0, 6), slice(6, None)):
        out, state = attend(**{name: args[name][:, piece] for name in ARRAYS[op]}, initial_state=state)
        pieces.append(out)
    assert_close((jnp.concatenate(pieces, axis=1), state), (whole, last), TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("op", "decay"),
    [("delta", "none"), ("delta", "head"), ("delta", "token"), ("delta", "channel"), ("dplr", "channel")],
)
def test_steps_are_the_whole(op: str, decay: str) -> None:
    args = inputs(op, (2, 4, 2, 3, 4), decay)
    whole, last = OPS[op](**args, implementation="reference")
    step = jax.jit({"delta": delta_attention_step, "dplr": dplr_attention_step}[op])
    state, shared = args.pop("initial_state"), {}
    if decay in ("none", "head"):
        shared["log_decay"] = args.pop("log_decay")
    for t in range(4):
        out, state = step(**{name: x[:, t] for name, x in args.items()}, **shared, state=state)
        np.testing.assert_allclose(out, whole[:, t], atol=1e-6)  # the same arithmetic
    np.testing.assert_allclose(state, last, atol=1e-6)


def test_a_single_token_is_a_step_by_default() -> None:
    args = inputs("delta", (1, 1, 1, 2, 2), "token")
    program = {
        name: str(jax.make_jaxpr(lambda a, n=name: delta_attention(**a, implementation=n))(args))
        for name in (None, "reference", "xla")
    }
    assert program[None] == program["reference"] != program["xla"]


@pytest.mark.parametrize("op", OPS)
def test_the_tpu_form_is_mapped_and_cut_over_devices(op: str) -> None:
    """Each of four devices takes an example and a pair of heads; under vmap there are three such problems."""
    args = inputs(op, (2, 8, 4, 2, 2), "strong")
    attend = functools.partial(OPS[op], implementation="pallas_tpu")
    right = OPS[op](**args, implementation="reference")
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        assert_close(jax.jit(attend)(**args), right, TOLERANCE["float32"])
    three = {name: jnp.stack([x] * 3) for name, x in args.items()}
    mapped = jax.jit(jax.vmap(lambda args: attend(**args)))(three)
    assert_close([x[2] for x in mapped], list(right), TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("delta", {"q": jnp.zeros((2, 5, 2))}, "should be"),
        ("delta", {"k": jnp.zeros((2, 5, 2, 4))}, "should be"),
        ("delta", {"v": jnp.zeros((2, 4, 2, 4))}, "should be"),
        ("delta", {"beta": jnp.zeros((2, 5, 2, 1))}, "beta"),
        ("delta", {"log_decay": jnp.zeros((2, 5))}, "log_decay"),
        ("delta", {"initial_state": jnp.zeros((2, 2, 4, 3))}, "initial_state"),
        ("delta", {"chunk_size": 6}, "power of two"),
        ("delta", {"implementation": "xl"}, "Did you mean 'xla'"),
        ("dplr", {"a": jnp.zeros((2, 5, 2))}, "a .* should be"),
        ("dplr", {"b": jnp.zeros((2, 5, 2, 4))}, "b .* should be"),
        ("dplr", {"log_decay": jnp.zeros((2, 5, 2))}, "log_decay"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(op: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPS[op](**inputs(op, (2, 5, 2, 3, 4), "token") | changes)
