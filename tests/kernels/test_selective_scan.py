"""The selective scan: fast forms against the equation, in value, gradient and final state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ar_jax.kernels.selective_scan import FORMS, selective_scan, selective_scan_step

FAST = sorted(set(FORMS) - {"reference"})
# float32: the same sums in another order. bfloat16: Pallas rounds the terms of sums over states and channels to 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def inputs(batch: int, time: int, groups: int, channels: int, size: int, seed: int = 0, dtype: str = "float32") -> Any:
    """Arguments with `channels` in each group."""
    r = np.random.default_rng(seed)
    shape = (batch, time, groups * channels)
    args = {
        "x": r.normal(size=shape),
        "delta": np.exp(r.normal(size=shape)),
        "a": -np.exp(r.normal(size=(groups * channels, size))),
        "b": r.normal(size=(batch, time, groups, size)),
        "c": r.normal(size=(batch, time, groups, size)),
        "skip": r.normal(size=groups * channels),
        "initial_state": r.normal(size=(batch, groups * channels, size)),
    }
    low = ("x", "delta", "b", "c")
    return {name: jnp.asarray(x, dtype if name in low else "float32") for name, x in args.items()}


def results(args: dict[str, Any], **options: Any) -> Any:
    """Outputs and final state, and the gradients of an uneven sum of both by all inputs."""

    def loss(args: dict[str, Any]) -> tuple[jax.Array, Any]:
        both = selective_scan(**args, **options)
        uneven = [(x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in both]
        return sum(uneven), both

    gradients, both = jax.grad(loss, has_aux=True)(args)
    return both, gradients


def assert_close(found: Any, right: Any, tolerance: float) -> None:
    """Relative to each array's largest number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max(initial=0)), rtol=0)


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking compiles for minutes
@given(
    st.tuples(st.integers(1, 2), st.integers(2, 20), st.integers(1, 2), st.integers(1, 4), st.integers(1, 5)),
    st.sampled_from([None, 1, 7, 16]),
    st.sampled_from([(), ("skip",), ("initial_state",), ("skip", "initial_state")]),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 1000),
)
def test_the_fast_form_is_the_equation_in_value_gradient_and_state(
    implementation: str, sizes: Any, chunk_size: int | None, without: tuple[str, ...], dtype: str, seed: int
) -> None:
    args = inputs(*sizes, seed=seed, dtype=dtype) | dict.fromkeys(without)
    fast = functools.partial(results, implementation=implementation, chunk_size=chunk_size)
    found = jax.jit(fast)(args)
    right = jax.jit(functools.partial(results, implementation="reference"))(args)
    assert found[0][0].dtype == dtype and found[0][1].dtype == jnp.float32
    assert_close(found, right, TOLERANCE[dtype])


def test_several_programs_of_several_chunks_are_the_equation() -> None:
    """Two groups of 128 channels, full lanes each, with more tokens than a chunk; b and c have gradients from each."""
    args = inputs(1, 20, 2, 128, 4)
    found = jax.jit(functools.partial(results, implementation="pallas_tpu", chunk_size=16))(args)
    right = jax.jit(functools.partial(results, implementation="reference"))(args)
    assert_close(found, right, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", FORMS)
def test_the_equation_is_the_one_of_the_docstring(implementation: str) -> None:
    """In numpy, one token after the other, with one b and c for all channels."""
    args = inputs(2, 5, 1, 3, 4)
    args |= {name: args[name][:, :, 0] for name in ("b", "c")}
    x, delta, a, b, c, skip, state = (np.asarray(x) for x in args.values())
    y, final = jax.jit(functools.partial(selective_scan, implementation=implementation))(**args)
    for t in range(5):
        state = np.exp(delta[:, t, :, None] * a) * state + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        right = (c[:, t, None] * state).sum(-1) + skip * x[:, t]
        np.testing.assert_allclose(y[:, t], right, atol=1e-5)  # float32
    np.testing.assert_allclose(final, state, atol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_the_state_continues_a_sequence(implementation: str) -> None:
    args = inputs(2, 13, 1, 3, 4)
    scan = jax.jit(functools.partial(selective_scan, implementation=implementation, chunk_size=4))
    whole, last = scan(**args)
    state, pieces = args["initial_state"], []
    for piece in (slice(0, 6), slice(6, None)):
        tokens = {name: args[name][:, piece] for name in ("x", "delta", "b", "c")}
        y, state = scan(**args | tokens | {"initial_state": state})
        pieces.append(y)
    assert_close((jnp.concatenate(pieces, axis=1), state), (whole, last), TOLERANCE["float32"])


def test_steps_are_the_whole() -> None:
    args = inputs(2, 4, 2, 3, 4)
    whole, last = selective_scan(**args, implementation="reference")
    state = args.pop("initial_state")
    for t in range(4):
        tokens = {name: args[name][:, t] for name in ("x", "delta", "b", "c")}
        y, state = jax.jit(selective_scan_step)(**args | tokens, state=state)
        np.testing.assert_allclose(y, whole[:, t], atol=1e-6)  # the same arithmetic
    np.testing.assert_allclose(state, last, atol=1e-6)


def test_no_array_has_the_states_of_all_tokens() -> None:
    """4,096 tokens of 8 channels and 64 states take 8 MB in float32; backward may hold those of a chunk, some times over."""
    args = inputs(1, 4096, 1, 8, 64)
    gradient = jax.jit(functools.partial(results, implementation="xla"))
    assert gradient.lower(args).compile().memory_analysis().temp_size_in_bytes < 4096 * 8 * 64 * 4


def test_the_tpu_form_is_mapped_and_cut_over_devices() -> None:
    """Each of two devices takes an example; under vmap there are three such problems."""
    args = inputs(2, 8, 1, 3, 2)
    scan = functools.partial(selective_scan, implementation="pallas_tpu")
    right = selective_scan(**args, implementation="reference")
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert_close(jax.jit(scan)(**args), right, TOLERANCE["float32"])
    three = {name: jnp.stack([x] * 3) for name, x in args.items()}
    mapped = jax.jit(jax.vmap(lambda args: scan(**args)))(three)
    assert_close([x[2] for x in mapped], list(right), TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 5))}, "x .* should both be"),
        ({"delta": jnp.zeros((2, 5, 3))}, "delta .* should both be"),
        ({"a": jnp.zeros((3, 4))}, "a .* should be"),
        ({"b": jnp.zeros((2, 5, 3))}, "b .* should both be"),
        ({"b": jnp.zeros((2, 5, 4, 4)), "c": jnp.zeros((2, 5, 4, 4))}, "4 groups .* 6 channels"),
        ({"skip": jnp.zeros(5)}, "skip"),
        ({"initial_state": jnp.zeros((2, 4, 6))}, "initial_state"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"implementation": "xl"}, "Did you mean 'xla'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs(2, 5, 2, 3, 4) | changes)
