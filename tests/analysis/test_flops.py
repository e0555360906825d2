"""The FLOP counter against counts by hand."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from ar_jax.analysis.flops import flops
from ar_jax.config import get_config
from ar_jax.plan import batch_shapes
from ar_jax.run import load_facts, system_of
from ar_jax.training.program import make_program

ROOT = Path(__file__).parents[2]

A, B = jnp.zeros((3, 4)), jnp.zeros((4, 5))
PRODUCT = 2 * 3 * 4 * 5


def repeated(a: Any, b: Any) -> jax.Array:
    return jax.lax.scan(lambda carry, _: (carry + a @ b, None), jnp.zeros((3, 5)), None, length=7)[0]


def nested(a: Any, b: Any) -> jax.Array:
    return jax.lax.scan(lambda carry, _: (repeated(a, b), None), jnp.zeros((3, 5)), None, length=2)[0]


def branches(a: Any, b: Any) -> jax.Array:
    return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 5)))


def kernel(a: Any, b: Any) -> jax.Array:
    def body(a_ref: Any, b_ref: Any, out_ref: Any) -> None:
        out_ref[...] = a_ref[...] @ b_ref[...]

    whole = [pallas.BlockSpec(x.shape, lambda i: (0, 0)) for x in (a, b)]
    out = pallas.BlockSpec((3, 5), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((12, 5), a.dtype)
    return pallas.pallas_call(body, grid=(4,), in_specs=whole, out_specs=out, out_shape=shape, interpret=True)(a, b)


@jax.custom_vjp
def custom(a: Any, b: Any) -> jax.Array:
    return a @ b


custom.defvjp(lambda a, b: (a @ b, None), lambda _, g: (jnp.zeros((3, 4)), jnp.zeros((4, 5))))


def convolved(a: Any, b: Any) -> jax.Array:
    """8 outputs of 5 channels, each from 3 x 4 inputs."""
    x, w = jnp.zeros((1, 4, 10)) + a[0, 0], jnp.zeros((5, 4, 3))
    return jax.lax.conv_general_dilated(x, w, (1,), "VALID")


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda a, b: a @ b, PRODUCT),
        (lambda a, b: jnp.einsum("ij,ik->kj", a, a), 2 * 3 * 4 * 4),
        (lambda a, b: jnp.tanh(a) + 1, 12 + 12),
        (lambda a, b: a.T.reshape(2, 6), 0),
        (lambda a, b: jnp.arange(10) + 1, 0),  # whole numbers are not counted
        (lambda a, b: a.sum(), 12),
        (jax.jit(lambda a, b: a @ b), PRODUCT),
        (jax.checkpoint(lambda a, b: a @ b), PRODUCT),
        (custom, PRODUCT),
        (repeated, 7 * (PRODUCT + 15)),
        (nested, 2 * 7 * (PRODUCT + 15)),
        (branches, PRODUCT + 1),  # and the comparison
        (kernel, 4 * PRODUCT),
        (convolved, 40 + 2 * (8 * 5) * (3 * 4)),
        (lambda a, b: jnp.fft.fft(jnp.zeros((2, 8), jnp.complex64)), 5 * 16 * 3),
    ],
)
def test_counts_are_the_ones_by_hand(function: Any, count: int) -> None:
    assert flops(function, A, B) == count


def test_shapes_suffice_and_a_batch_multiplies() -> None:
    shapes = [jax.ShapeDtypeStruct((6, *x.shape), x.dtype) for x in (A, B)]
    assert flops(jax.vmap(jnp.matmul), *shapes) == 6 * PRODUCT


def test_the_gradient_of_a_product_costs_twice_the_product() -> None:
    gradient = jax.grad(lambda a, b: (a @ b).sum(), argnums=(0, 1))
    assert 2 * PRODUCT <= flops(gradient, A, B) <= 3 * PRODUCT + 15


def test_an_unbounded_loop_is_refused() -> None:
    loop = functools.partial(jax.lax.while_loop, lambda x: x.sum() < 1, lambda x: x + 1)
    with pytest.raises(NotImplementedError, match="number of turns"):
        flops(loop, A)


def test_a_step_is_thrice_its_loss_but_what_has_no_gradient_counts_once() -> None:
    """Tokens that are told in place of images leave out an encoder that is not trained, and nothing else."""
    config = get_config(ROOT / "configs/llamagen.py:smoke")
    system = system_of(config, load_facts(config))
    program, batch = make_program(system, config), batch_shapes(system, 4)
    encoder = flops(system.tokens_of, program.shapes.params, batch)
    tokens = jax.eval_shape(system.tokens_of, program.shapes.params, batch)
    step, without = program.model_flops(batch), program.model_flops({"tokens": tokens, "label": batch["label"]})
    assert encoder > 0 and step is not None and without is not None and step - without == encoder
