"""The mixers call the kernels and nothing else: training and sampling are the same by whatever form."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels import linear_attention, step_attention
from ar_jax.system import System, compiled

FORMS = {
    ("softmax", "random, in sets"): step_attention.FORMS,
    ("softmax window", "raster"): step_attention.FORMS,
    ("linear, learned decay", "raster"): getattr(linear_attention, "FORMS", {}),
}
ROWS = [(mixer, order, form) for (mixer, order), forms in FORMS.items() for form in forms if form != "reference"]


@functools.cache
def losses_and_samples(mixer: str, order: str, form: str) -> Any:
    """Losses of three steps of gradient descent, and greedy samples of what came of them."""
    row = cases.MIXERS[mixer] | {"implementation": form}
    system: System = cases.tiny.__wrapped__(mixer, order, model__mixer=row)
    batch = {"image": jnp.asarray(np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (4, 3, 3, 1)), jnp.float32)}
    batch["label"] = jnp.arange(4) % 3

    @jax.jit
    def step(params: Any, key: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(lambda p: system.loss(p, batch, key, jnp.float32(0))[0])(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), loss

    params, losses = system.init(jax.random.key(0)), []
    for n in range(3):
        params, loss = step(params, jax.random.key(n))
        losses.append(float(loss))
    drawing = system.drawing(top_k=1)
    drop = np.zeros(4, bool)
    return losses, compiled(system.sample)(params, jax.random.key(9), batch["label"], drop, drawing, None)


@pytest.mark.parametrize(
    ("mixer", "order", "form"),
    [
        pytest.param(*row, marks=pytest.mark.slow) if "window" in row[0] else row for row in ROWS
    ],  # softmax stands for it
)
def test_training_and_sampling_are_the_same_by_every_form(mixer: str, order: str, form: str) -> None:
    losses, samples = losses_and_samples(mixer, order, form)
    expected, expected_samples = losses_and_samples(mixer, order, "reference")
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)  # float32, three steps
    np.testing.assert_array_equal(samples, expected_samples)
