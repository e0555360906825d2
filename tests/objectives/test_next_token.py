"""Next token: what is trained where only a run of answers is asked for."""

from __future__ import annotations

import cases
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.objectives.next_token import NextToken
from ar_jax.sampling.likelihood import teacher_forced


def test_a_run_of_answers_is_trained_and_every_run_is_drawn() -> None:
    """The loss is the mean over one of the runs of three of nine answers, each run for some key."""
    system, count = cases.tiny(), 3
    model, params, values = system.model, cases.tiny_params(system), cases.tokens(system, 2)
    context = model.context(None, 2, jnp.arange(2, dtype=jnp.int32))

    @jax.jit
    def losses(params: object) -> tuple[jax.Array, jax.Array]:
        hidden, target = teacher_forced(model, model.feed.parallel(), params, values, context)
        each = model.ask(params, "loss", hidden, target, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), 60)
        drawn = jax.vmap(lambda key: NextToken(num_answers=count).in_order(model, params, values, context, key)[0])(
            keys
        )
        return each, drawn

    each, drawn = (np.asarray(a) for a in losses(params))
    runs = np.stack([each[:, i : i + count].mean() for i in range(each.shape[1] - count + 1)])
    distance = np.abs(drawn[:, None] - runs[None])
    assert distance.min(axis=1).max() < 1e-5  # float32
    assert set(distance.argmin(axis=1)) == set(range(len(runs)))
