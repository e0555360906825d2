"""Step attention: every implementation against the definition, in value and gradient."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ar_jax.kernels.step_attention import FORMS, merge, step_attention, visibility
from ar_jax.kernels.step_attention.visibility import EMPTY, FULL

NEVER = np.iinfo(np.int32).max
# float32: sums of 9 terms of order one. bfloat16 keeps 8 bits: logits, weights and results each round by up to 1/256.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2}

SMALL_BLOCKS = 8


@pytest.fixture(autouse=True)
def blocks_that_do_not_hold_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are tiny here; blocks are made smaller still, so that there are several."""
    xla = sys.modules["ar_jax.kernels.step_attention.xla"]
    monkeypatch.setattr(xla, "LARGEST_BLOCK", SMALL_BLOCKS)
    monkeypatch.setattr(xla, "FEW_QUERIES", 0)
    monkeypatch.setattr(xla, "FEW_LOGITS", 0)


every_implementation = pytest.mark.parametrize("implementation", FORMS)


def definition(arrays: dict[str, Any], masks: dict[str, Any], soft_cap: float | None) -> tuple[jax.Array, jax.Array]:
    """The docstring's equation in float32, with repeated key heads and a softmax over what is visible alone."""
    q, k, v = (arrays[name].astype(jnp.float32) for name in "qkv")
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[3] ** -0.5
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits += arrays.get("bias", jnp.zeros((1, 1, 1, 1)))
    visible = jnp.asarray(seen(**masks))[:, None]
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    if "sinks" in arrays:
        total += jnp.exp(arrays["sinks"])[None, :, None, None]
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total, v)
    return out, jnp.moveaxis(jnp.where(some, jnp.log(total), 0.0)[..., 0], 2, 1)


def seen(
    query_step: Any,
    key_step: Any,
    strict: bool = False,
    window: int | None = None,
    query_segment: Any = None,
    key_segment: Any = None,
    query_position: Any = None,
    key_position: Any = None,
    reach: Any = None,
) -> np.ndarray:
    """The dense mask, [B or 1, T, S], from the words of the docstring."""
    age = np.asarray(query_step, np.int64)[:, :, None] - np.asarray(key_step, np.int64)[:, None, :]
    visible = age > 0 if strict else age >= 0
    if window is not None:
        visible = visible & (age < window)
    if query_segment is not None:
        visible = visible & (np.asarray(query_segment)[:, :, None] == np.asarray(key_segment)[:, None, :])
    if reach is not None:
        offset = np.asarray(query_position)[:, :, None, :] - np.asarray(key_position)[:, None, :, :]
        for axis, (before, after) in enumerate(reach):
            visible = visible & (offset[..., axis] <= before) & (offset[..., axis] >= -after)
    return visible


KINDS = ("raster", "random", "next_scale", "block", "strict", "window", "segments", "neighbourhood", "shared")


def masks_of(kind: str, batch: int, time: int, keys: int, r: np.random.Generator) -> dict[str, Any]:
    """The arguments of step_attention that make a mask of that kind. Some keys are never read."""
    positions = {"query": np.arange(keys - time, keys), "key": np.arange(keys)}
    steps = {side: np.tile(row[None], (batch, 1)) for side, row in positions.items()}
    if kind in ("random", "strict", "window"):
        steps = {side: r.integers(0, 6, row.shape) for side, row in steps.items()}
    if kind == "next_scale":
        steps = {side: np.floor(np.sqrt(np.maximum(row, 0))) for side, row in steps.items()}
    if kind == "block":
        steps = {side: row // 4 for side, row in steps.items()}
    if kind == "neighbourhood":
        steps = {side: np.zeros_like(row) for side, row in steps.items()}
    steps["key"] = np.where(r.random(steps["key"].shape) < 0.1, NEVER, steps["key"])
    if kind == "shared":
        steps = {side: row[:1] for side, row in steps.items()}
    masks: dict[str, Any] = {f"{side}_step": jnp.asarray(row, jnp.int32) for side, row in steps.items()}
    if kind == "strict":
        masks["strict"] = True
    if kind == "window":
        masks["window"] = int(r.integers(1, 4))
    if kind == "segments":
        masks |= {f"{side}_segment": jnp.asarray(row // 7, jnp.int32)[None] for side, row in positions.items()}
    if kind == "neighbourhood":
        grid = {side: np.stack([row // 5, row % 5], axis=-1)[None] for side, row in positions.items()}
        masks |= {f"{side}_position": jnp.asarray(row, jnp.int32) for side, row in grid.items()}
        masks["reach"] = ((1, 0), (2, 1))
    return masks


def arrays_of(
    shape: tuple[int, int, int, int, int, int], r: np.random.Generator, names: tuple[str, ...], dtype: str
) -> dict[str, Any]:
    """q, k and v, and of `names` "bias" (for all examples) and "sinks"."""
    batch, time, keys, heads, shared, dim = shape
    shapes = {"q": (batch, time, heads, dim), "k": (batch, keys, shared, dim), "v": (batch, keys, shared, dim)}
    more = {"bias": (1, heads, time, keys), "sinks": (heads,)}
    arrays = {name: jnp.asarray(r.normal(size=size), dtype) for name, size in shapes.items()}
    return arrays | {name: jnp.asarray(r.normal(size=more[name]), jnp.float32) for name in names}


def value_and_gradients(attend: Any, arrays: dict[str, Any]) -> Any:
    """Output and log-sum-exp, and the gradients of a sum of their elements with uneven weights by all arrays."""

    def loss(arrays: dict[str, Any]) -> tuple[jax.Array, Any]:
        out, lse = attend(arrays)
        lse = jnp.where(lse < -1e20, 0.0, lse)  # what is read by nobody is told by a number that is no result
        uneven = [(a.astype(jnp.float32) * jnp.cos(jnp.arange(a.size)).reshape(a.shape)).sum() for a in (out, lse)]
        return sum(uneven), (out, lse)

    gradients, values = jax.grad(loss, has_aux=True)(arrays)
    return values, gradients


@every_implementation
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking compiles for minutes
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(0, 9), st.sampled_from([(4, 1), (4, 2), (3, 3)])),
    st.sampled_from([(), ("bias",), ("sinks",)]),
    st.sampled_from([None, 2.0]),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 1000),
)
def test_it_is_its_definition_in_value_and_gradient(
    implementation: str, kind: str, sizes: Any, more: tuple[str, ...], soft_cap: float | None, dtype: str, seed: int
) -> None:
    batch, time, older, (heads, shared) = sizes
    r = np.random.default_rng(seed)
    masks = masks_of(kind, batch, time, time + older, r)
    arrays = arrays_of((batch, time, time + older, heads, shared, 4), r, more, dtype)

    def attend(arrays: dict[str, Any]) -> Any:
        options = {"logit_soft_cap": soft_cap, "implementation": implementation, "return_lse": True}
        return step_attention(**arrays, **masks, **options)

    found = jax.jit(functools.partial(value_and_gradients, attend))(arrays)
    want = jax.jit(functools.partial(value_and_gradients, lambda arrays: definition(arrays, masks, soft_cap)))(arrays)
    assert found[0][0].dtype == arrays["v"].dtype
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * max(1, jnp.abs(b).max()))


@every_implementation
def test_rows_that_see_nothing_are_zero_with_finite_gradients(implementation: str) -> None:
    arrays = arrays_of((2, 3, 4, 2, 1, 4), np.random.default_rng(0), ("bias",), "float32")
    arrays["k"] *= 100
    steps = jnp.asarray([0, 1, 2]), jnp.asarray([2, 2, 3, NEVER])

    def attend(arrays: dict[str, Any]) -> Any:
        options = {"return_lse": True, "implementation": implementation}
        return step_attention(**arrays, query_step=steps[0], key_step=steps[1], **options)

    (out, _), gradients = jax.jit(functools.partial(value_and_gradients, attend))(arrays)
    assert not np.asarray(out[:, :2]).any() and np.asarray(out[:, 2]).any()
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients.values())
    assert not np.asarray(gradients["q"][:, :2]).any()
    assert not np.asarray(gradients["k"][:, 2:]).any()  # keys that nobody sees


@every_implementation
def test_a_window_reads_the_last_steps_only(implementation: str) -> None:
    """With equal logits the output is the mean of the values that are seen."""
    time = 5
    v = jnp.arange(time, dtype=jnp.float32).reshape(1, time, 1, 1)
    zero, step = jnp.zeros((1, time, 1, 1)), jnp.arange(time)[None]
    means = {None: [0, 0.5, 1, 1.5, 2], 1: [0, 1, 2, 3, 4], 2: [0, 0.5, 1.5, 2.5, 3.5]}
    for window, mean in means.items():
        out = step_attention(zero, zero, v, step, step, window=window, implementation=implementation)
        np.testing.assert_allclose(out[0, :, 0, 0], mean, atol=1e-6)  # float32 means of small whole numbers


@every_implementation
def test_grouped_heads_are_repeated_key_heads_and_scale_replaces_the_default(implementation: str) -> None:
    r = np.random.default_rng(1)
    arrays, masks = arrays_of((2, 5, 6, 4, 2, 4), r, (), "float32"), masks_of("random", 2, 5, 6, r)
    attend = functools.partial(step_attention, **masks, implementation=implementation)
    grouped = attend(**arrays)
    repeated = attend(**arrays | {name: jnp.repeat(arrays[name], 2, axis=2) for name in "kv"})
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)  # float32, the same sums
    scaled = attend(scale=0.5 / 3, **arrays | {"q": arrays["q"] * 3})
    np.testing.assert_allclose(scaled, grouped, atol=1e-5)  # 1 / sqrt(4) is one half


@every_implementation
def test_it_can_be_mapped_over_another_axis(implementation: str) -> None:
    r = np.random.default_rng(2)
    arrays, masks = arrays_of((6, 5, 9, 2, 2, 4), r, (), "float32"), masks_of("random", 6, 5, 9, r)
    attend = functools.partial(step_attention, implementation=implementation)
    whole = jax.jit(attend)(**arrays, **masks)
    pairs = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), arrays | masks)
    mapped = jax.jit(jax.vmap(lambda own: attend(**own)))(pairs)
    np.testing.assert_allclose(mapped.reshape(whole.shape), whole, atol=1e-6)  # float32, the same sums


def test_parts_of_the_keys_merge_in_any_grouping_to_all_of_them() -> None:
    r = np.random.default_rng(3)
    arrays, masks = arrays_of((2, 5, 12, 4, 2, 4), r, (), "float32"), masks_of("random", 2, 5, 12, r)

    def part(piece: slice) -> Any:
        cut = {name: a[:, piece] if name in ("k", "v", "key_step") else a for name, a in (arrays | masks).items()}
        return step_attention(**cut, return_lse=True)

    whole, whole_lse = step_attention(**arrays, **masks, return_lse=True)
    parts = [part(slice(i, i + 4)) for i in (0, 4, 8)]
    tree = [parts[0], merge(*map(jnp.stack, zip(*parts[1:], strict=True)))]
    for pieces in (parts, tree):
        out, lse = merge(*map(jnp.stack, zip(*pieces, strict=True)))
        np.testing.assert_allclose(out, whole, atol=1e-5)  # float32: sums of 12 terms
        some = whole_lse > -1e20
        np.testing.assert_allclose(lse[some], whole_lse[some], atol=1e-5)


def test_blocks_are_told_apart_as_the_dense_mask_tells_them() -> None:
    r = np.random.default_rng(4)
    for kind in KINDS:
        masks = masks_of(kind, 2, 24, 24, r)
        rows = {name: a[None] if a.ndim < 2 else a for name, a in masks.items() if hasattr(a, "ndim")}
        kinds = np.asarray(visibility(**masks | rows).blocks(4, 6))
        dense = seen(**masks).reshape(-1, 6, 4, 4, 6).swapaxes(2, 3)
        assert not dense[kinds == EMPTY].any() and dense[kinds == FULL].all()
        if kind in ("raster", "random", "next_scale", "block", "strict", "shared"):  # one coordinate, one bound
            np.testing.assert_array_equal(kinds == EMPTY, ~dense.any(axis=(-1, -2)))
            np.testing.assert_array_equal(kinds == FULL, dense.all(axis=(-1, -2)))


def test_time_grows_in_blocks_that_are_seen_and_memory_with_the_length() -> None:
    """The blocked form's temporary memory, by the compiler, doubles with the length; the dense form's quadruples."""

    def temporary(length: int, implementation: str) -> int:
        q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        step = jax.ShapeDtypeStruct((length,), jnp.int32)
        attend = functools.partial(step_attention, implementation=implementation)
        grad = jax.grad(lambda q, step: attend(q, q, q, step, step).sum())
        return jax.jit(grad).lower(q, step).compile().memory_analysis().temp_size_in_bytes

    assert temporary(512, "xla") < 2.5 * temporary(256, "xla")
    assert temporary(512, "reference") > 3 * temporary(256, "reference")


def arguments(**changes: Any) -> dict[str, Any]:
    r = np.random.default_rng(0)
    return arrays_of((2, 3, 5, 4, 2, 4), r, (), "float32") | masks_of("random", 2, 3, 5, r) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 3, 4))}, "should be"),
        ({"q": jnp.zeros((2, 3, 3, 4))}, "N a multiple of K"),
        ({"q": jnp.zeros((2, 3, 4, 6))}, "should be"),
        ({"q": jnp.zeros((3, 3, 4, 4))}, "should be"),
        ({"v": jnp.zeros((2, 4, 2, 4))}, "should be"),
        ({"query_step": jnp.zeros((2, 5), jnp.int32)}, r"query_step .* \[2 or 1, 3\]"),
        ({"key_step": jnp.zeros((3, 5), jnp.int32)}, "key_step"),
        ({"key_step": jnp.zeros(4, jnp.int32)}, "key_step"),
        ({"key_step": jnp.zeros((2, 5))}, "key_step"),
        ({"query_segment": jnp.zeros(3, jnp.int32)}, "query_segment and key_segment belong together"),
        ({"reach": ((1, 1),)}, "reach"),
        ({"bias": jnp.zeros((2, 4, 3, 4))}, r"bias .* should be \[2 or 1, 4, 3, 5\]"),
        ({"sinks": jnp.zeros(2)}, "sinks"),
        ({"implementation": "referense"}, "Did you mean 'reference'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    jax.eval_shape(lambda: step_attention(**arguments()))
    with pytest.raises(ValueError, match=message):
        step_attention(**arguments(**changes))
