"""The selective scan on TPUs: a program keeps the states of up to a thousand channels and walks through the tokens.

States lie as [S, D], so that channels fill the lanes; b and c come as [S, R], a column for each of R tokens. The vector unit
is what the scan waits for: so sums over states and over channels are left to the matrix unit, as products with zeros and
ones, which round their terms to the dtype of x.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.dispatch import interpreted

CHUNK = 128
ROW = 32  # tokens of one pass through the loop
LANES = 128
NUMBERS = 16 * 1024  # of the state of one program, at most
LOG2_E = math.log2(math.e)
COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20)


def pallas_tpu(
    x: Array, delta: Array, a: Array, b: Array, c: Array, *, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `selective_scan`; b and c are [B, T, G, S]."""
    batch, length, channels = x.shape
    tile = 32 // min(x.dtype.itemsize, delta.dtype.itemsize)  # tokens that lie in one register
    chunk = -(-min(chunk_size or CHUNK, length) // tile) * tile
    row = ROW if chunk % ROW == 0 else tile
    whole = channels // b.shape[2]
    spare = -whole % LANES if whole < channels else 0  # each of several groups begins a tile of lanes

    def padded(s: Array) -> Array:
        """Padding has delta 0, which neither writes nor decays."""
        return jnp.pad(s, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (s.ndim - 2))

    def columns(s: Array) -> Array:
        """[B, T, G, S] -> [B, G, T / R, S, R]."""
        s = padded(s.astype(jnp.float32)).reshape(batch, -1, row, *s.shape[2:])
        return jnp.transpose(s, (0, 3, 1, 4, 2))

    def widened(s: Array) -> Array:
        """[..., D], with `spare` channels after each group's own."""
        s = s.reshape(*s.shape[:-1], -1, whole)
        return jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, spare)]).reshape(*s.shape[:-2], -1)

    def narrowed(s: Array) -> Array:
        return s.reshape(*s.shape[:-1], -1, whole + spare)[..., :whole].reshape(*s.shape[:-1], channels)

    rate, start = widened(a.astype(jnp.float32).T), widened(jnp.swapaxes(initial_state, 1, 2))
    x, delta = (padded(widened(s)) for s in (x, delta))
    y, state = _scan(chunk, x, delta, rate, columns(b), columns(c), start)
    return narrowed(y[:, :length]), jnp.swapaxes(narrowed(state), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk: int, *inputs: Array) -> tuple[Array, Array]:
    """x and delta [B, T, D], rate [S, D], b and c [B, G, T / R, S, R], state [B, S, D]."""
    return _forward(chunk, *inputs, keep=False)


def _scan_forward(chunk: int, *inputs: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    y, final, before = _forward(chunk, *inputs, keep=True)
    return (y, final), (*inputs[:5], before)


def _scan_backward(chunk: int, residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    dx, ddelta, drate, db, dc, dstart = _backward(chunk, *residuals, *cotangents)
    batch, groups, *own = residuals[3].shape
    parts = lambda s: s.reshape(batch, groups, -1, *own).sum(2)  # of the channels of a group  # noqa: E731
    return dx, ddelta, drate.sum(0), parts(db), parts(dc), dstart


_scan.defvjp(_scan_forward, _scan_backward)


def _specs(channels: int, b: Array, chunk: int, place: Any) -> tuple[int, dict[str, pl.BlockSpec]]:
    """How many channels a program takes, and blocks of each kind of array; `place` says which chunk is the t-th.

    The channels are all of a group, or a multiple of LANES that divides them.
    """
    groups, _, size, row = b.shape[1:]
    whole = channels // groups
    most = min(whole, max(LANES, NUMBERS // size))
    part = next((n for n in range(most, LANES - 1, -1) if n % LANES == 0 and whole % n == 0), whole)
    rows = (1, 1, chunk // row, size, row)
    return part, {
        "tokens": pl.BlockSpec((1, chunk, part), lambda b, d, t: (b, place(t), d)),
        "rate": pl.BlockSpec((size, part), lambda b, d, t: (0, d)),
        "columns": pl.BlockSpec(rows, lambda b, d, t: (b, d // (whole // part), place(t), 0, 0)),
        "own columns": pl.BlockSpec(rows, lambda b, d, t: (b, d, place(t), 0, 0)),
        "state": pl.BlockSpec((1, size, part), lambda b, d, t: (b, 0, d)),
        "states": pl.BlockSpec((1, 1, size, part), lambda b, d, t: (b, place(t), 0, d)),
    }


def _forward(chunk: int, x: Array, delta: Array, rate: Array, b: Array, c: Array, start: Array, *, keep: bool) -> Any:
    batch, size, channels = start.shape
    chunks = x.shape[1] // chunk
    part, spec = _specs(channels, b, chunk, lambda t: t)
    shapes = {
        "tokens": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "state": jax.ShapeDtypeStruct(start.shape, jnp.float32),
        "states": jax.ShapeDtypeStruct((batch, chunks, size, channels), jnp.float32),
    }
    outs = list(shapes)[: 3 if keep else 2]
    return pl.pallas_call(
        _forward_kernel,
        grid=(batch, channels // part, chunks),
        in_specs=[spec[kind] for kind in ("tokens", "tokens", "rate", "columns", "columns", "state")],
        out_specs=[spec[kind] for kind in outs],
        out_shape=[shapes[kind] for kind in outs],
        scratch_shapes=[pltpu.VMEM((size, part), jnp.float32)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="selective_scan_forward",
    )(x, delta, rate, b, c, start)


def _forward_kernel(x, delta, rate, b, c, start, y, final, *rest):
    """A chunk of tokens. `rest` is the states kept for backward, if any, and the state carried in scratch."""
    *kept, carried = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = start[0]

    for ref in kept:
        ref[0, 0] = carried[...]
    rates = rate[...] * LOG2_E

    def row(i, state):
        here, steps, values = _tokens(x, delta, b, i)
        written, own_b, own_c = steps * values, b[0, 0, i], c[0, 0, i]
        read = []
        for t in range(b.shape[4]):
            own = slice(t, t + 1)
            state = jnp.exp2(steps[own] * rates) * state + own_b[:, own] * written[own]
            read.append(state)
        y[0, here] = _sum_states(own_c, read, x.dtype).astype(y.dtype)
        return state

    carried[...] = jax.lax.fori_loop(0, b.shape[2], row, carried[...])

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        final[0] = carried[...]


def _tokens(x, delta, b, i):
    """Where the i-th row of tokens lies in the chunk, its step sizes and its values."""
    length = b.shape[4]
    here = pl.ds(pl.multiple_of(i * length, length), length)
    return here, delta[0, here].astype(jnp.float32), x[0, here].astype(jnp.float32)


def _dot(x: Array, y: Array, dtype: Any, axis: int = 1) -> Array:
    """The product that sums over that axis of x and the first of y."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((axis,), (0,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(dtype), y.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )


def _sum_states(columns: Array, terms: list[Array], dtype: Any) -> Array:
    """The columns [S, R] times each token's [S, D] -> [R, D]."""
    size, length = columns.shape
    state, token = (jax.lax.broadcasted_iota(jnp.int32, (size, length * size), axis) for axis in (0, 1))
    repeated = _dot(columns, (state == token % size).astype(jnp.float32), dtype, 0)  # [R, R S]
    own, token = (jax.lax.broadcasted_iota(jnp.int32, repeated.shape, axis) for axis in (0, 1))
    return _dot(jnp.where(own == token // size, repeated, 0.0), jnp.concatenate(terms), dtype)


def _sum_channels(terms: list[Array], dtype: Any) -> Array:
    """Of each token [S, D] -> [S, R]."""
    size, part = terms[0].shape
    lanes = LANES if part % LANES == 0 else part
    folded = [sum(term[:, n : n + lanes] for n in range(0, part, lanes)) for term in terms]
    sums = _dot(jnp.concatenate(folded), jnp.ones((lanes, len(terms))), dtype)  # the same in all columns
    found = jnp.zeros((size, len(terms)))
    token = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
    for t in range(len(terms)):
        found = jnp.where(token == t, sums[t * size : (t + 1) * size], found)
    return found


def _backward(
    chunk: int, x: Array, delta: Array, rate: Array, b: Array, c: Array, before: Array, dy: Array, dfinal: Array
) -> tuple[Array, ...]:
    """The gradients; that of the rate for each example, those of b and c for each program's own channels."""
    batch, chunks, size, channels = before.shape
    part, spec = _specs(channels, b, chunk, lambda t: chunks - 1 - t)
    ins = ("tokens", "tokens", "rate", "columns", "columns", "states", "tokens", "state")
    outs = ("tokens", "tokens", "state", "own columns", "own columns", "state")
    columns = jax.ShapeDtypeStruct((batch, channels // part, *b.shape[2:]), jnp.float32)
    state = jax.ShapeDtypeStruct(dfinal.shape, jnp.float32)
    return pl.pallas_call(
        _backward_kernel,
        grid=(batch, channels // part, chunks),
        in_specs=[spec[kind] for kind in ins],
        out_specs=[spec[kind] for kind in outs],
        out_shape=[jax.ShapeDtypeStruct(s.shape, s.dtype) for s in (x, delta, state, columns, columns, state)],
        scratch_shapes=[
            pltpu.VMEM((size, part), jnp.float32),
            pltpu.VMEM((chunk + 1, size, part), jnp.float32),
        ],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="selective_scan_backward",
    )(x, delta, rate, b, c, before, dy, dfinal)


def _backward_kernel(x, delta, rate, b, c, before, dy, dfinal, dx, ddelta, drate, db, dc, dstart, carried, states):
    """The chunks from the last to the first: in each the states anew, then the tokens from the last to the first.

    `carried` is the gradient of the state after the chunk, states[t] the state before its token t.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dfinal[0]
        drate[0] = jnp.zeros(drate.shape[1:], jnp.float32)

    rates, dtype = rate[...] * LOG2_E, x.dtype
    rows, length = b.shape[2], b.shape[4]

    def again(i, state):
        _, steps, values = _tokens(x, delta, b, i)
        written, own_b = steps * values, b[0, 0, i]
        for t in range(length):
            own = slice(t, t + 1)
            state = jnp.exp2(steps[own] * rates) * state + own_b[:, own] * written[own]
            states[i * length + t + 1] = state
        return state

    states[0] = before[0, 0]
    jax.lax.fori_loop(0, rows, again, before[0, 0])

    def row(j, gradients):
        dstate, drates = gradients
        i = rows - 1 - j
        here, steps, values = _tokens(x, delta, b, i)
        written, dout, own_b, own_c = steps * values, dy[0, here].astype(jnp.float32), b[0, 0, i], c[0, 0, i]
        of_state, of_decay, of_b, of_c = ([dout] * length for _ in range(4))  # to be filled
        for t in reversed(range(length)):
            own = slice(t, t + 1)
            decay = jnp.exp2(steps[own] * rates)
            decayed = decay * states[i * length + t]
            dstate += own_c[:, own] * dout[own]
            of_c[t] = states[i * length + t + 1] * dout[own]
            of_b[t] = dstate * written[own]
            of_state[t] = dstate
            dlog_decay = dstate * decayed
            drates += dlog_decay * steps[own]
            of_decay[t] = dlog_decay * rates
            dstate *= decay
        dwritten = _sum_states(own_b, of_state, dtype)
        dx[0, here] = (dwritten * steps).astype(dx.dtype)
        ddelta[0, here] = (_sum_states(jnp.ones(own_b.shape), of_decay, dtype) / LOG2_E + dwritten * values).astype(
            ddelta.dtype
        )
        db[0, 0, i], dc[0, 0, i] = _sum_channels(of_b, dtype), _sum_channels(of_c, dtype)
        return dstate, drates

    carried[...], drate[0] = jax.lax.fori_loop(0, rows, row, (carried[...], drate[0]))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dstart[0] = carried[...]
