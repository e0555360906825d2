"""Log-linear attention: chunks and single tokens against all pairs, in value, gradient and memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.kernels.log_linear import empty_levels, log_linear_attention

BATCH, LENGTH, HEADS, KEY, VALUE, LEVELS = 2, 21, 2, 3, 4, 6


def inputs(length: int = LENGTH, levels: int = LEVELS) -> dict[str, Any]:
    r = np.random.default_rng(0)
    tokens = (BATCH, length, HEADS)
    args = {
        "q": r.normal(size=(*tokens, KEY)),
        "k": r.normal(size=(*tokens, KEY)),
        "v": r.normal(size=(*tokens, VALUE)),
    }
    args |= {"level_scales": r.uniform(0, 1, (*tokens, levels)), "log_decay": -r.uniform(0, 0.5, tokens)}
    return {name: jnp.asarray(x, jnp.float32) for name, x in args.items()}


def results(args: dict[str, Any], **options: Any) -> Any:
    """Outputs, and the gradients of an uneven sum of them by the inputs."""

    def loss(args: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        out = log_linear_attention(**args, **options)[0]
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    return jax.jit(jax.grad(loss, has_aux=True))(args)


def assert_close(found: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(b).max())))  # float32, sums of 21 terms


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_chunks_are_all_pairs(chunk_size: int | None) -> None:
    right = results(inputs(), implementation="reference")
    assert_close(results(inputs(), implementation="xla", chunk_size=chunk_size), right)


@pytest.mark.parametrize("prompt", [8, 13])
def test_a_prompt_in_chunks_and_tokens_behind_it_are_the_whole(prompt: int) -> None:
    """Also that the prompt leaves the memory that single tokens do, and that what follows in one piece reads it."""
    args = inputs()
    right = jax.jit(lambda args: log_linear_attention(**args)[0])(args)
    attend = jax.jit(lambda args, state: log_linear_attention(**args, initial_state=state, chunk_size=4))
    part = lambda start, stop: {name: a[:, start:stop] for name, a in args.items()}  # noqa: E731
    empty = empty_levels(BATCH, HEADS, LEVELS - 1, KEY, VALUE)
    first, state = attend(part(0, prompt), empty)
    one_by_one = empty
    for t in range(prompt):
        _, one_by_one = attend(part(t, t + 1), one_by_one)
    assert_close(state, one_by_one)
    second, _ = attend(part(prompt, LENGTH), state)
    assert_close(np.concatenate([first, second], axis=1), right)


def test_the_cost_grows_by_a_logarithm_more_than_the_length() -> None:
    def count(length: int) -> int:
        args = jax.eval_shape(lambda: inputs(length, 14))
        return flops(lambda args: log_linear_attention(**args, chunk_size=1)[0], args)

    one, two, four = (count(length) / length for length in (256, 512, 1024))
    assert two - one == pytest.approx(four - two, rel=0.05) and two > one  # the same more for every doubling


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="level_scales have 5 levels, which serve 16 tokens, not 21"):
        log_linear_attention(**inputs(levels=5))
