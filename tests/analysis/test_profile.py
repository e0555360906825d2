"""The profile of a run tells products from what only moves numbers."""

import jax
import jax.numpy as jnp
import pytest

from ar_jax.analysis import profile


def seconds_by_kind(function, *arrays):
    compiled = jax.jit(function).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    seconds = profile.trace(lambda: compiled(*arrays))
    kinds = profile.by_kind(seconds, compiled.as_text())
    assert sum(kinds.values()) == pytest.approx(sum(seconds.values()))
    return kinds


def test_products_of_matrices_are_most_of_a_loop_of_products():
    w = jnp.ones((768, 768))
    kinds = seconds_by_kind(lambda w: jax.lax.fori_loop(0, 20, lambda i, x: 1e-3 * (x @ w), w), w)
    assert kinds["products"] > kinds["moves"] + kinds["others"]


def test_what_only_moves_numbers_is_no_product():
    kinds = seconds_by_kind(lambda x: x.swapaxes(0, 1).copy(), jnp.ones((2048, 1024)))
    assert kinds["products"] == 0 < kinds["moves"] + kinds["others"]


def test_a_directory_without_a_trace_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no trace in"):
        profile.operations(tmp_path)
