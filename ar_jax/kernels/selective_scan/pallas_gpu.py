"""The selective scan on GPUs: many short chunks at once, whose states are then joined, one chunk after the other.

Over a chunk the state decays by exp(a sum of delta), so that what a chunk adds is found without knowing what came before
it. A program has some channels of a chunk and their states in registers; its few tokens are written out one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ar_jax.kernels import triton
from ar_jax.kernels.dispatch import interpreted

CHUNK = 16  # tokens: backward has all their states in registers
CHANNELS = 32  # of a program


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the arrays are cut.

    Attributes:
      batch: B.
      length: T, a multiple of `size`.
      channels: D.
      states: S.
      groups: G.
      size: tokens of a chunk.
      width: channels of a program, all of the same group.
    """

    batch: int
    length: int
    channels: int
    states: int
    groups: int
    size: int
    width: int

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return self.length // self.size

    @property
    def blocks(self) -> int:
        """How many programs share a chunk."""
        return pl.cdiv(self.channels, self.width)

    def specs(self) -> dict[str, pl.BlockSpec]:
        """What a program of the grid (chunk, block of channels, example) is given of each array."""
        channels, states = self.blocks * self.width, pl.next_power_of_2(self.states)
        group = lambda d: d * self.width * self.groups // self.channels  # noqa: E731
        return {
            "token": pl.BlockSpec((None, self.length, channels), lambda _, d, b: (b, 0, 0)),
            "rate": pl.BlockSpec((channels, states), lambda _, d, b: (0, 0)),
            "vector": pl.BlockSpec((None, self.length, None, states), lambda _, d, b: (b, 0, group(d), 0)),
            "part": pl.BlockSpec((None, None, self.length, states), lambda _, d, b: (b, d, 0, 0)),
            "sum": pl.BlockSpec((None, self.count, channels), lambda _, d, b: (b, 0, 0)),
            "states": pl.BlockSpec((None, self.count, channels, states), lambda _, d, b: (b, 0, 0, 0)),
            "state": pl.BlockSpec((None, channels, states), lambda _, d, b: (b, 0, 0)),
        }

    def own(self) -> Any:
        """A program's channels."""
        return pl.ds(pl.program_id(1) * self.width, self.width)

    def token(self, ref: Any, own: Any, time: Any) -> Array:
        """A token's numbers in a program's channels, [width] float32."""
        return triton.load(ref, (time, own), (self.length, self.channels)).astype(jnp.float32)

    def vector(self, ref: Any, time: Any) -> Array:
        """A token's vector, [S] float32."""
        return triton.load(ref, (time, slice(None)), (self.length, self.states)).astype(jnp.float32)

    def rate(self, ref: Any, own: Any) -> Array:
        """Of a program's channels, [width, S]."""
        return triton.load(ref, (own, slice(None)), (self.channels, self.states)).astype(jnp.float32)

    def states_of(self, ref: Any, own: Any, chunk: Any) -> Array:
        """Of a program's channels, [width, S]."""
        shape = (self.count, self.channels, self.states)
        return triton.load(ref, (chunk, own, slice(None)), shape)

    def keep_states(self, ref: Any, own: Any, chunk: Any, states: Array) -> None:
        """Writes them."""
        triton.store(ref, (chunk, own, slice(None)), states, (self.count, self.channels, self.states))

    def call(
        self, kernel: Any, arrays: list[Any], ins: list[str], outs: list[tuple[str, Any]], chunks: int, warps: int = 2
    ) -> Any:
        """Runs a kernel on so many chunks at once."""
        spec = self.specs()
        return pl.pallas_call(
            kernel,
            name=getattr(kernel, "func", kernel).__name__,
            grid=(chunks, self.blocks, self.batch),
            in_specs=[spec[name] for name in ins],
            out_specs=[spec[name] for name, _ in outs],
            out_shape=[shape for _, shape in outs],
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
            interpret=interpreted(),
        )(*arrays)


def pallas_gpu(
    x: Array, delta: Array, a: Array, b: Array, c: Array, *, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `selective_scan`; b and c are [B, T, G, S]. Of chunk_size only a smaller one than CHUNK counts."""
    length, channels, groups = x.shape[1], x.shape[2], b.shape[2]
    size = min(chunk_size or CHUNK, CHUNK)
    # Blocks measure powers of two, and none may lie in two groups.
    width = CHANNELS if groups == 1 else math.gcd(channels // groups, CHANNELS)
    # What is added has delta 0, and neither writes nor decays.
    padded = [jnp.pad(s, [(0, 0), (0, -length % size)] + [(0, 0)] * (s.ndim - 2)) for s in (x, delta, b, c)]
    parts = Parts(x.shape[0], padded[0].shape[1], channels, a.shape[1], groups, size, width)
    y, state = _scan(parts, padded[0], padded[1], a, *padded[2:], initial_state)
    return y[:, :length], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(parts: Parts, x: Array, delta: Array, a: Array, b: Array, c: Array, state: Array) -> tuple[Array, Array]:
    return _forward(parts, x, delta, a, b, c, state)[0]


def _forward(
    parts: Parts, x: Array, delta: Array, a: Array, b: Array, c: Array, state: Array
) -> tuple[tuple[Array, Array], Any]:
    """The result, and what backward needs: inputs, and the state before each chunk."""
    chunks = jax.ShapeDtypeStruct((parts.batch, parts.count, parts.channels, parts.states), jnp.float32)
    ins = ["token", "token", "rate", "vector"]
    kernel = functools.partial(selective_scan_added, parts=parts)
    (added,) = parts.call(kernel, [x, delta, a, b], ins, [("states", chunks)], parts.count)
    before, final = _joined(parts, delta, a, added, state, reverse=False)
    kernel = functools.partial(selective_scan_outs, parts=parts)
    outs = [("token", jax.ShapeDtypeStruct(x.shape, x.dtype))]
    (y,) = parts.call(kernel, [x, delta, a, b, c, before], [*ins, "vector", "states"], outs, parts.count)
    return (y, final), (x, delta, a, b, c, before)


def _joined(parts: Parts, delta: Array, a: Array, added: Array, state: Array, reverse: bool) -> tuple[Array, Array]:
    """The state where each chunk begins, in the order of the walk, and where the last one ends."""
    sums = delta.astype(jnp.float32).reshape(parts.batch, parts.count, parts.size, parts.channels).sum(axis=2)
    shapes = [jax.ShapeDtypeStruct(s.shape, jnp.float32) for s in (added, state)]
    outs = list(zip(("states", "state"), shapes, strict=True))
    kernel = functools.partial(selective_scan_join, parts=parts, reverse=reverse)
    return parts.call(kernel, [sums, a, added, state], ["sum", "rate", "states", "state"], outs, 1)


def _backward(parts: Parts, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    x, delta, a, b, c, before = saved
    dy, d_final = cotangents
    chunks = jax.ShapeDtypeStruct(before.shape, jnp.float32)
    kernel = functools.partial(selective_scan_added_gradient, parts=parts)
    ins = ["token", "rate", "vector", "token"]
    (added,) = parts.call(kernel, [delta, a, c, dy], ins, [("states", chunks)], parts.count)
    after, d_state = _joined(parts, delta, a, added, d_final, reverse=True)
    shared = jax.ShapeDtypeStruct((parts.batch, parts.blocks, parts.length, parts.states), jnp.float32)
    dx, d_delta, d_a, d_b, d_c = parts.call(
        functools.partial(selective_scan_gradients, parts=parts),
        [x, delta, a, b, c, before, after, dy],
        ["token", "token", "rate", "vector", "vector", "states", "states", "token"],
        [
            ("token", jax.ShapeDtypeStruct(x.shape, x.dtype)),
            ("token", jax.ShapeDtypeStruct(x.shape, delta.dtype)),
            ("states", chunks),
            ("part", shared),
            ("part", shared),
        ],
        parts.count,
        warps=4,
    )

    def whole(s: Array) -> Array:
        """[B, blocks, T, S] -> [B, T, G, S], summed over the channels of each group."""
        s = s.reshape(parts.batch, parts.groups, -1, parts.length, parts.states).sum(axis=2)
        return jnp.swapaxes(s, 1, 2)

    d_a = d_a.sum(axis=(0, 1)).astype(a.dtype)
    return dx, d_delta, d_a, whole(d_b).astype(b.dtype), whole(d_c).astype(c.dtype), d_state


_scan.defvjp(_forward, _backward)


def _step(delta: Array, rate: Array) -> Array:
    """What a token leaves of the state, [width, S]."""
    return jnp.exp(delta[:, None] * rate)


def selective_scan_added(x: Any, delta: Any, a: Any, b: Any, added: Any, *, parts: Parts) -> None:
    """The state after a chunk that begins with none."""
    chunk, own = pl.program_id(0), parts.own()
    rate = parts.rate(a, own)
    state = jnp.zeros(rate.shape, jnp.float32)
    for place in range(parts.size):
        time = chunk * parts.size + place
        step = parts.token(delta, own, time)
        state = _step(step, rate) * state + (step * parts.token(x, own, time))[:, None] * parts.vector(b, time)[None]
    parts.keep_states(added, own, chunk, state)


def selective_scan_join(
    sums: Any, a: Any, added: Any, start: Any, states: Any, end: Any, *, parts: Parts, reverse: bool
) -> None:
    """The state where each chunk begins: of the chunk before it, decayed, and what that one added."""
    own = parts.own()
    rate = parts.rate(a, own)

    def chunk(step: Any, state: Array) -> Array:
        index = parts.count - 1 - step if reverse else step
        parts.keep_states(states, own, index, state)
        total = triton.load(sums, (index, own), (parts.count, parts.channels))
        return _step(total, rate) * state + parts.states_of(added, own, index)

    state = triton.load(start, (own, slice(None)), (parts.channels, parts.states))
    state = jax.lax.fori_loop(0, parts.count, chunk, state)
    triton.store(end, (own, slice(None)), state, (parts.channels, parts.states))


def selective_scan_outs(x: Any, delta: Any, a: Any, b: Any, c: Any, before: Any, y: Any, *, parts: Parts) -> None:
    """The outputs of a chunk."""
    chunk, own = pl.program_id(0), parts.own()
    rate = parts.rate(a, own)
    state = parts.states_of(before, own, chunk)
    for place in range(parts.size):
        time = chunk * parts.size + place
        step = parts.token(delta, own, time)
        state = _step(step, rate) * state + (step * parts.token(x, own, time))[:, None] * parts.vector(b, time)[None]
        out = (state * parts.vector(c, time)[None]).sum(axis=1)
        triton.store(y, (time, own), out, (parts.length, parts.channels))


def selective_scan_added_gradient(delta: Any, a: Any, c: Any, dy: Any, added: Any, *, parts: Parts) -> None:
    """The gradient of the state before a chunk, of whose end nobody asks."""
    chunk, own = pl.program_id(0), parts.own()
    rate = parts.rate(a, own)
    d_state = jnp.zeros(rate.shape, jnp.float32)
    for place in reversed(range(parts.size)):
        time = chunk * parts.size + place
        d_state += parts.token(dy, own, time)[:, None] * parts.vector(c, time)[None]
        d_state *= _step(parts.token(delta, own, time), rate)
    parts.keep_states(added, own, chunk, d_state)


def selective_scan_gradients(
    x: Any,
    delta: Any,
    a: Any,
    b: Any,
    c: Any,
    before: Any,
    after: Any,
    dy: Any,
    dx: Any,
    d_delta: Any,
    d_a: Any,
    d_b: Any,
    d_c: Any,
    *,
    parts: Parts,
) -> None:
    """Of a chunk: its states anew, then from its end to its start."""
    chunk, own = pl.program_id(0), parts.own()
    rate = parts.rate(a, own)
    states = [parts.states_of(before, own, chunk)]
    for place in range(parts.size):
        time = chunk * parts.size + place
        step = parts.token(delta, own, time)
        written = (step * parts.token(x, own, time))[:, None] * parts.vector(b, time)[None]
        states.append(_step(step, rate) * states[-1] + written)

    d_state = parts.states_of(after, own, chunk)
    d_rate = jnp.zeros(rate.shape, jnp.float32)
    for place in reversed(range(parts.size)):
        time = chunk * parts.size + place
        step, value, d_out = (parts.token(ref, own, time) for ref in (delta, x, dy))
        d_state += d_out[:, None] * parts.vector(c, time)[None]
        d_written = (d_state * parts.vector(b, time)[None]).sum(axis=1)  # of delta x
        d_vectors = (step * value)[:, None] * d_state, d_out[:, None] * states[place + 1]
        d_state *= _step(step, rate)
        d_exponent = d_state * states[place]
        d_rate += step[:, None] * d_exponent
        d_step = value * d_written + (d_exponent * rate).sum(axis=1)
        for ref, result in ((dx, step * d_written), (d_delta, d_step)):
            triton.store(ref, (time, own), result, (parts.length, parts.channels))
        for ref, vectors in zip((d_b, d_c), d_vectors, strict=True):
            triton.store(ref, (time, slice(None)), vectors.sum(axis=0), (parts.length, parts.states))
    parts.keep_states(d_a, own, chunk, d_rate)
