"""Mesa attention: chunks against the equation, in value, gradient and memory, exactly and by conjugate gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels.mesa import MesaMemory, mesa_attention

BATCH, LENGTH, HEADS, KEY, VALUE = 2, 11, 2, 4, 3


def inputs() -> dict[str, Any]:
    r = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k = (unit(r.normal(size=(BATCH, LENGTH, HEADS, KEY))) for _ in range(2))
    root = r.normal(size=(BATCH, HEADS, KEY, KEY))
    args = {
        "q": q, "k": k, "v": r.normal(size=(BATCH, LENGTH, HEADS, VALUE)), "beta": r.uniform(0, 1, (BATCH, LENGTH, HEADS)),
        "ridge": r.uniform(0.5, 1.5, (HEADS, KEY)), "log_decay": -r.uniform(0, 1, (BATCH, LENGTH, HEADS)),
        "keys": root @ root.swapaxes(-1, -2), "values": r.normal(size=(BATCH, HEADS, KEY, VALUE)),
    }  # fmt: skip
    return {name: jnp.asarray(x, jnp.float32) for name, x in args.items()}


def results(args: dict[str, Any], **options: Any) -> Any:
    """Outputs and memory, and the gradients of an uneven sum of all by the inputs."""

    def loss(args: dict[str, Any]) -> tuple[jax.Array, Any]:
        own = {name: x for name, x in args.items() if name not in ("keys", "values")}
        keys = (args["keys"] + jnp.swapaxes(args["keys"], 2, 3)) / 2  # only what is symmetric has a meaning
        found = mesa_attention(**own, initial_state=MesaMemory(keys, args["values"]), **options)
        uneven = [(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in jax.tree.leaves(found)]
        return sum(uneven), found

    return jax.jit(jax.grad(loss, has_aux=True))(args)


@pytest.mark.parametrize("num_iterations", [None, 12])
def test_chunks_are_the_equation(num_iterations: int | None) -> None:
    """The right numbers are always those of the exact equation: twelve turns have converged, and so have their gradients.

    To what the 1e-5 in their denominators leaves: 1e-4 or so of each answer, of which the ridge's gradient sums 22.
    """
    right = results(inputs(), num_iterations=None, implementation="reference")
    found = results(inputs(), num_iterations=num_iterations, implementation="xla", chunk_size=4)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=(2e-3 if num_iterations else 5e-5) * scale)  # see above; float32


def test_what_does_not_fit_is_told() -> None:
    args = {name: x for name, x in inputs().items() if name not in ("keys", "values")}
    with pytest.raises(ValueError, match=r"ridge \(4,\) should be \(2, 4\)"):
        mesa_attention(**args | {"ridge": args["ridge"][0]})
    with pytest.raises(ValueError, match="start 'one' should be one of diagonal, zero"):
        mesa_attention(**args, start="one")
