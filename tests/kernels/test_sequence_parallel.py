"""Sequences that are cut over devices: what one device computes, in value and gradient, with less room on each."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_step_attention import arrays_of, blocks_that_do_not_hold_the_whole, masks_of, value_and_gradients

from ar_jax.analysis.hlo import Program
from ar_jax.kernels.delta_attention import DPLR_FORMS, delta_attention, dplr_attention
from ar_jax.kernels.delta_attention import FORMS as DELTA_FORMS
from ar_jax.kernels.linear_attention import FORMS as LINEAR_FORMS
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.kernels.selective_scan import FORMS as SCAN_FORMS
from ar_jax.kernels.selective_scan import selective_scan
from ar_jax.kernels.step_attention import FORMS as STEP_FORMS
from ar_jax.kernels.step_attention import Visibility, step_attention, visibility
from ar_jax.kernels.step_attention.visibility import EMPTY
from ar_jax.kernels.step_attention.zigzag import exchanged

__all__ = ["blocks_that_do_not_hold_the_whole"]  # a fixture that holds here, too
pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def mesh(**sizes: int) -> Mesh:
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def same(found: Any, want: Any, tolerance: float) -> None:
    """Relative to each array's largest number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), rtol=0)


# How they come together, the kind of mask, the form, what else there is, the mesh.
ATTENTION = [
    ("ring", "segments", "xla", ("sinks",), dict(sequence=4)),
    ("ring", "window", "reference", ("bias", "sinks"), dict(data=2, sequence=2)),
    ("ring", "raster", "pallas_tpu", (), dict(sequence=2, tensor=2)),
    ("tree", "next_scale", "xla", ("sinks",), dict(data=2, sequence=2)),
    ("zigzag", "segments", "xla", ("sinks",), dict(sequence=4)),
    ("zigzag", "window", "reference", ("bias", "sinks"), dict(sequence=4)),
]
MORE_ATTENTION = [
    (across, kind, form, more, dict(sequence=4))
    for form, kind, more in [
        ("reference", "strict", ()),
        ("xla", "raster", ()),
        ("xla", "neighbourhood", ("bias",)),
        ("xla", "shared", ("sinks",)),
        ("pallas_tpu", "random", ("sinks",)),
        ("pallas_tpu", "window", ("bias",)),
        ("pallas_gpu", "next_scale", ("sinks",)),
        ("pallas_gpu", "segments", ("bias",)),
    ]
    for across in ("ring", "zigzag", "tree")
]


@pytest.mark.parametrize(
    ("across", "kind", "form", "more", "sizes"),
    [*ATTENTION, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE_ATTENTION)],
    ids=str,
)
def test_attention_is_that_of_one_device(
    across: str, kind: str, form: str, more: tuple[str, ...], sizes: dict[str, int]
) -> None:
    r = np.random.default_rng(0)
    masks, arrays = masks_of(kind, 2, 15, 23, r), arrays_of((2, 15, 23, 4, 2, 4), r, more, "float32")

    def attend(arrays: dict[str, Any], **options: Any) -> Any:
        return step_attention(**arrays, **masks, logit_soft_cap=2.0, return_lse=True, **options)

    alone = functools.partial(attend, implementation="reference")
    want = jax.jit(functools.partial(value_and_gradients, alone))(arrays)
    with jax.set_mesh(mesh(**sizes)):
        cut = functools.partial(attend, across=across, implementation=form)
        found = jax.jit(functools.partial(value_and_gradients, cut))(arrays)
    same(found, want, 2e-5)  # float32: sums of 23 terms of order one


def test_a_zigzag_in_bfloat16_is_one_device_in_bfloat16() -> None:
    r = np.random.default_rng(1)
    masks, arrays = masks_of("raster", 2, 15, 23, r), arrays_of((2, 15, 23, 4, 2, 4), r, (), "bfloat16")
    attend = functools.partial(step_attention, **masks, return_lse=True)
    alone = functools.partial(value_and_gradients, lambda given: attend(**given, implementation="reference"))
    want = jax.jit(alone)(jax.tree.map(lambda a: a.astype(jnp.float32), arrays))
    with jax.set_mesh(mesh(sequence=4)):
        cut = functools.partial(value_and_gradients, lambda given: attend(**given, across="zigzag"))
        found = jax.jit(cut)(arrays)
    same(found, want, 2e-2)  # a bfloat16 has eight bits: outputs, weights and what is sent are rounded to them


def visited(across: str, parts: int, length: int, block: int) -> np.ndarray:
    """How many blocks a causal mask lets each device read at each hop of the ring, [devices, hops]."""
    step = jnp.arange(length, dtype=jnp.int32)[None]
    whole = visibility(step, step)
    laid = (lambda a, axis: exchanged(a, axis, 2)) if across == "zigzag" else (lambda a, axis: a)

    def count(bounds: jax.Array, keys: jax.Array) -> jax.Array:
        bounds, keys = (laid(a, "sequence") for a in (bounds, keys))
        counts = []
        for _ in range(parts):
            kinds = Visibility(bounds, bounds, keys, whole.has_lower).blocks(block, block)
            counts.append((kinds != EMPTY).sum())
            keys = jax.lax.ppermute(keys, "sequence", [(i, (i + 1) % parts) for i in range(parts)])
        return jnp.stack(counts)[None]

    cut = PartitionSpec(None, None, "sequence")
    mapped = jax.shard_map(count, mesh=mesh(sequence=parts), in_specs=(cut, cut), out_specs=PartitionSpec("sequence"))
    return np.asarray(jax.jit(mapped)(whole.upper, whole.key))


def test_a_zigzag_gives_every_device_as_much_to_read_at_every_hop() -> None:
    """All wait for the slowest at each hop, so what counts is the most that any device reads at it."""
    blocks = {across: visited(across, 4, 512, 8) for across in ("ring", "zigzag")}
    assert blocks["ring"].sum() == blocks["zigzag"].sum() == 64 * 65 / 2  # of 64 rows of blocks, each up to its own
    most = {across: counts.sum(axis=1).max() / counts.sum(axis=1).mean() for across, counts in blocks.items()}
    assert most["zigzag"] == 1 and most["ring"] == pytest.approx(2 - 1 / 4, rel=0.01)
    assert (blocks["zigzag"] == blocks["zigzag"][:1]).all()
    time = {across: counts.max(axis=0).sum() for across, counts in blocks.items()}
    assert time["zigzag"] == blocks["zigzag"].sum() / 4 and time["ring"] == pytest.approx(
        1.74 * time["zigzag"], rel=0.01
    )


def linear(decay: str, bonus: bool, r: np.random.Generator, implementation: str) -> Any:
    axes = {"none": None, "head": (3,), "token": (2, 31, 3), "channel": (2, 31, 3, 5)}[decay]
    args = tokens(r, "qkv") | {"initial_state": normal(r, 2, 3, 5, 5)}
    args |= {"bonus": normal(r, 3, 5)} if bonus else {}
    args |= {"log_decay": -jnp.abs(normal(r, *axes))} if axes else {}
    return lambda given: linear_attention(**given, chunk_size=4, implementation=implementation), args


def delta(decay: bool, r: np.random.Generator, implementation: str) -> Any:
    args = tokens(r, "qkv") | {"initial_state": normal(r, 2, 3, 5, 5), "beta": jax.nn.sigmoid(normal(r, 2, 31, 3))}
    args |= {"log_decay": -jnp.abs(normal(r, 2, 31, 3))} if decay else {}
    args["k"] /= jnp.linalg.norm(args["k"], axis=-1, keepdims=True)
    return lambda given: delta_attention(**given, chunk_size=4, implementation=implementation), args


def dplr(r: np.random.Generator, implementation: str) -> Any:
    args = tokens(r, "qkvab") | {"initial_state": normal(r, 2, 3, 5, 5)}
    args |= {name: args[name] / 5 for name in "ab"} | {"log_decay": -jnp.abs(normal(r, 2, 31, 3, 5))}
    return lambda given: dplr_attention(**given, chunk_size=4, implementation=implementation), args


def scan(r: np.random.Generator, implementation: str) -> Any:
    args = {"x": normal(r, 2, 31, 6), "delta": jax.nn.softplus(normal(r, 2, 31, 6)), "a": -jnp.abs(normal(r, 6, 4))}
    args |= {"b": normal(r, 2, 31, 2, 4), "c": normal(r, 2, 31, 2, 4), "skip": normal(r, 6)}
    args["initial_state"] = normal(r, 2, 6, 4)
    return lambda given: selective_scan(**given, chunk_size=4, implementation=implementation), args


def normal(r: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(r.normal(size=shape), jnp.float32)


def tokens(r: np.random.Generator, names: str) -> dict[str, jax.Array]:
    return {name: normal(r, 2, 31, 3, 5) for name in names}


RECURRENCES: dict[str, tuple[Callable[..., Any], Any]] = {
    "linear": (functools.partial(linear, "none", False), LINEAR_FORMS),
    "linear, decay of a head": (functools.partial(linear, "head", False), LINEAR_FORMS),
    "linear, decay of a token": (functools.partial(linear, "token", False), LINEAR_FORMS),
    "linear, decay of a channel": (functools.partial(linear, "channel", True), LINEAR_FORMS),
    "delta": (functools.partial(delta, False), DELTA_FORMS),
    "delta, decay of a token": (functools.partial(delta, True), DELTA_FORMS),
    "dplr": (dplr, DPLR_FORMS),
    "selective scan": (scan, SCAN_FORMS),
}
FAST = [("linear, decay of a head", "xla"), ("linear, decay of a channel", "xla"), ("delta, decay of a token", "xla")]
FAST += [("selective scan", "xla")]


@pytest.mark.parametrize(
    ("recurrence", "form"),
    [
        pytest.param(name, form, marks=() if (name, form) in FAST else pytest.mark.slow)
        for name, (_, forms) in RECURRENCES.items()
        for form in forms
    ],
)
def test_a_recurrence_is_that_of_one_device(recurrence: str, form: str) -> None:
    """Outputs, the state after the last token, and gradients by all inputs, the state before the first token included."""

    def value_and_gradient(run: Any, args: Any) -> Any:
        def loss(args: Any) -> Any:
            both = run(args)
            return sum((a * jnp.cos(jnp.arange(a.size)).reshape(a.shape)).sum() for a in both), both

        return jax.grad(loss, has_aux=True)(args)

    make, _ = RECURRENCES[recurrence]
    run, args = make(np.random.default_rng(0), "reference")
    want = jax.jit(functools.partial(value_and_gradient, run))(args)
    with jax.set_mesh(mesh(sequence=4)):
        cut, _ = make(np.random.default_rng(0), form)
        found = jax.jit(functools.partial(value_and_gradient, cut))(args)
    same(found, want, 2e-5)  # float32: sums of 31 terms of order one, in another order


def attention(q: jax.Array, k: jax.Array, v: jax.Array, step: jax.Array) -> jax.Array:
    return step_attention(q, k, v, step, step)


def retention(q: jax.Array, k: jax.Array, v: jax.Array, step: jax.Array) -> jax.Array:
    return linear_attention(q, k, v, log_decay=jnp.full(q.shape[2], -0.01))[0]


def trained(form: Any, length: int, devices: int) -> Any:
    """The compiled gradient where each device holds its part of the tokens before and after."""
    over = mesh(sequence=devices)
    q = jax.ShapeDtypeStruct(
        (1, length, 2, 8), jnp.float32, sharding=NamedSharding(over, PartitionSpec(None, "sequence"))
    )
    step = jax.ShapeDtypeStruct((length,), jnp.int32, sharding=NamedSharding(over, PartitionSpec("sequence")))
    with jax.set_mesh(over):
        gradient = jax.grad(lambda *arrays: (form(*arrays) ** 2).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient, out_shardings=q.sharding).lower(q, q, q, step).compile()


def passed_round(q: jax.Array, k: jax.Array, v: jax.Array, step: jax.Array) -> jax.Array:
    return step_attention(q, k, v, step, step, across="ring")


# Of the memory that two devices take each, what four may; and what each may send, in parts of a sequence. The keys and values
# of three others, and once more with their gradients, which come home; a zigzag, which long sequences take, also half of
# queries, keys, values and outputs, and of their gradients, and keeps what it has laid out anew; or a few states.
@pytest.mark.parametrize(
    ("form", "room", "parts"),
    [(attention, 0.75, 24.75), pytest.param(passed_round, 0.7, 20.5, marks=pytest.mark.slow), (retention, 0.7, 0.01)],
)
def test_a_device_holds_its_part_of_a_long_sequence_and_never_another_whole(
    form: Any, room: float, parts: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ar_jax.kernels.step_attention.xla"], "LARGEST_BLOCK", 64)
    length, programs = 32768, []
    for devices in (1, 2, 4):
        programs.append(trained(form, length, devices))
    # Keys and values that come in are a device's part, too: there are more parts than on a device alone, and none is whole.
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    largest = [max(size for _, size, _ in Program(program.as_text()).arrays()) for program in programs]
    assert sizes[2] < room * min(sizes[:2]) and largest[2] <= largest[1] / 2
    sent = Program(programs[2].as_text()).collectives({"sequence": 4})
    assert {row.kind for row in sent} == {"collective-permute"}
    total = sum(row.bytes for row in sent) / (length // 4 * 2 * 8 * 4)
    assert total < parts and (form is not attention or total > 20.5)


def test_fewer_tokens_than_devices_stay_whole_and_what_is_not_known_is_refused() -> None:
    q, step = jnp.ones((1, 3, 2, 4)), jnp.arange(3)
    with jax.set_mesh(mesh(sequence=4)):
        out = jax.jit(lambda: step_attention(q, q, q, step, step))()
        np.testing.assert_allclose(out, 1, atol=1e-6)
        with pytest.raises(ValueError, match="cuts 3 queries or 3 keys .* fewer than the devices; use one of gather"):
            step_attention(q, q, q, step, step, across="ring")
        with pytest.raises(ValueError, match="no across='rang'. Did you mean 'ring'"):
            step_attention(q, q, q, step, step, across="rang")


def test_every_form_of_attention_has_a_backward_form_for_the_ring() -> None:
    from ar_jax.kernels.step_attention import BACKWARD

    assert set(BACKWARD) == set(STEP_FORMS.values())
