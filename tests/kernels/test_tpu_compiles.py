"""Every kernel, forward and backward, goes through the real TPU compiler at the shapes of training and decoding."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernels_tpu as tpu  # noqa: E402

NO_COMPILER = "The TPU's compiler is not here: `make test` installs it into .cache, or AR_JAX_LIBTPU names a libtpu.so."
pytestmark = pytest.mark.skipif(tpu.libtpu() is None, reason=NO_COMPILER)


def cases(kernel: str, lengths: tuple[int, ...], head_dims: tuple[int, ...]) -> list[tpu.Case]:
    return [tpu.Case(kernel, *rest) for rest in itertools.product(tpu.directions(kernel), lengths, head_dims)]


# One chip stands for all, but for what is the most intricate.
ROWS = [
    (kernel, chip, chip == "v5e" or (kernel, chip) == ("step_attention", "v6e"))
    for kernel in tpu.KERNELS
    for chip in tpu.CHIPS
]


@pytest.mark.parametrize(
    ("kernel", "chip"), [pytest.param(k, c, marks=() if short else pytest.mark.slow) for k, c, short in ROWS]
)
def test_it_compiles(kernel: str, chip: str) -> None:
    tpu.compile_apart(cases(kernel, (4096,), (128,)), chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", tpu.CHIPS)
@pytest.mark.parametrize("kernel", tpu.KERNELS)
def test_it_compiles_at_every_shape_of_training(kernel: str, chip: str) -> None:
    tpu.compile_apart(cases(kernel, (4096, 16384), (64, 128)), chip)


def test_named_blocks_are_all_that_a_step_reads_of_a_cache_however_long() -> None:
    """By the compiler's count: neither the program around the kernel touches the cache, nor the kernel what is not named."""
    lengths = 4096, 16384
    moved = tpu.compile_apart(cases("selected_attention", lengths, (128,)), "v5e")
    named = 2 * tpu.HEADS * 32 * 64 * 128 * 2  # keys and values, bfloat16
    for length, count in zip(lengths, moved, strict=True):
        assert named <= count < 1.1 * named < 2 * tpu.HEADS * length * 128 * 2


def test_what_the_compiler_refuses_is_told() -> None:
    with pytest.raises(RuntimeError, match="step_attention, forward, 64 x 8 on v9"):
        tpu.compile_apart([tpu.Case("step_attention", "forward", 64, 8)], "v9")
