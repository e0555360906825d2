"""The XLA forms of the kernels on this CPU beside naive ones: python benchmarks/kernels_cpu.py [--markdown FILE].

Seconds and temporary bytes of each by the number of tokens, and the slope between the two longest: 1 is linear. Naive is what
takes a table of all pairs of tokens (of the delta rule and the selective scan: the recurrence, token after token), measured as
far as --longest-naive. Medians of three calls, one after another in one process; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from ar_jax.kernels.delta_attention import delta_attention  # noqa: E402
from ar_jax.kernels.linear_attention import linear_attention  # noqa: E402
from ar_jax.kernels.selective_scan import selective_scan  # noqa: E402
from ar_jax.kernels.step_attention import step_attention  # noqa: E402

HEADS, HEAD_DIM, STATES, WINDOW = 2, 32, 16, 256
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)


def arrays(length: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Normal numbers [1, length, *shape]."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, (1, length, *shape)) for key, shape in zip(keys, shapes, strict=True)]


def all_pairs(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None = None) -> jax.Array:
    """Linear attention by the table of all pairs of tokens."""
    causal = jnp.tri(q.shape[1], dtype=bool)[None, None]
    if log_decay is None:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    else:
        sums = jnp.cumsum(log_decay, axis=1)
        if log_decay.ndim == 4:  # a decay for each channel: numerically safe for mild decays only
            scores = jnp.einsum("btnh,bsnh->bnts", q * jnp.exp(sums), k * jnp.exp(-sums))
        else:
            sums = jnp.moveaxis(sums, 1, 2)
            decays = jnp.exp(jnp.where(causal, sums[..., :, None] - sums[..., None, :], -jnp.inf))
            scores = jnp.einsum("btnh,bsnh->bnts", q, k) * decays
    return jnp.einsum("bnts,bsnh->btnh", jnp.where(causal, scores, 0), v)


def linear(decay: tuple[int, ...] | None) -> Callable[[int, str], tuple[Callable[..., Any], list[jax.Array]]]:
    """`linear_attention` with decays [1, T, *decay], or without."""

    def build(length: int, form: str) -> tuple[Callable[..., Any], list[jax.Array]]:
        q, k, v, *more = arrays(length, *[(HEADS, HEAD_DIM)] * 3, *([] if decay is None else [decay]))
        decays = [-0.01 * jax.nn.softplus(m) for m in more]
        if form == "naive":
            return all_pairs, [q, k, v, *decays]
        if not more:
            return lambda q, k, v: linear_attention(q, k, v, implementation=form)[0], [q, k, v]
        return lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, implementation=form)[0], [q, k, v, *decays]

    return build


def delta(length: int, form: str) -> tuple[Callable[..., Any], list[jax.Array]]:
    """`delta_attention` without a decay."""
    form = "reference" if form == "naive" else form
    q, k, v, beta = arrays(length, *[(HEADS, HEAD_DIM)] * 3, (HEADS,))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    return lambda q, k, v, b: delta_attention(q, k, v, b, implementation=form)[0], [q, k, v, jax.nn.sigmoid(beta)]


def scan(length: int, form: str) -> tuple[Callable[..., Any], list[jax.Array]]:
    """`selective_scan`, as wide as the others."""
    form = "reference" if form == "naive" else form
    x, dt, b, c = arrays(length, (HEADS * HEAD_DIM,), (HEADS * HEAD_DIM,), (STATES,), (STATES,))
    a = -jnp.ones((HEADS * HEAD_DIM, STATES))
    return lambda *args: selective_scan(*args, implementation=form)[0], [x, jax.nn.softplus(dt - 3), a, b, c]


def attention(window: int | None) -> Callable[[int, str], tuple[Callable[..., Any], list[jax.Array]]]:
    """`step_attention`, causal."""

    def build(length: int, form: str) -> tuple[Callable[..., Any], list[jax.Array]]:
        form = "reference" if form == "naive" else form
        steps = jnp.arange(length, dtype=jnp.int32)[None]
        q, k, v = arrays(length, *[(HEADS, HEAD_DIM)] * 3)
        return lambda q, k, v, s: step_attention(q, k, v, s, s, window=window, implementation=form), [q, k, v, steps]

    return build


CASES = {
    "linear_attention": linear(None),
    "linear_attention, decay per step": linear((HEADS,)),
    "linear_attention, decay per channel": linear((HEADS, HEAD_DIM)),
    "delta_attention": delta,
    "selective_scan": scan,
    f"step_attention, window {WINDOW}": attention(WINDOW),
    "step_attention, causal": attention(None),
}
QUADRATIC = ("step_attention, causal",)  # in time, as attention to all that came before is; its memory is linear


def measure(build: Callable[..., Any], length: int, form: str) -> tuple[float, int]:
    """Seconds of a call, and temporary bytes."""
    function, inputs = build(length, form)
    compiled = jax.jit(function).lower(*inputs).compile()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest-naive", type=int, default=8192)
    parser.add_argument("--markdown", type=Path, help="FILE.md to write the table to")
    arguments = parser.parse_args()
    head = ["kernel", *(f"{length:,} tokens" for length in LENGTHS), "slope of time", "slope of memory"]
    head += [f"naive / xla, {length:,} tokens" for length in (2048, arguments.longest_naive)]
    lines = [f"| {' | '.join(head)} |", f"{'| --- ' * len(head)}|"]
    print(*lines, sep="\n", flush=True)
    for name, build in CASES.items():
        lengths = [length for length in LENGTHS if name not in QUADRATIC or length <= 16384]
        found = {length: measure(build, length, "xla") for length in lengths}
        (t0, m0), (t1, m1) = found[lengths[-2]], found[lengths[-1]]
        cells = [f"{1e3 * found[n][0]:.1f} ms, {found[n][1] / 2**20:.1f} MiB" if n in found else "" for n in LENGTHS]
        cells += [f"{math.log2(t1 / t0):.2f}", f"{math.log2(m1 / m0):.2f}"]
        for length in (2048, arguments.longest_naive):
            seconds, _ = measure(build, length, "naive")
            cells.append(f"{seconds / found[length][0]:.1f}")
        lines.append(f"| `{name.replace(',', '`,', 1)}{'' if ',' in name else '`'} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
