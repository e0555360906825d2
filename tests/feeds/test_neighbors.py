"""NAR (S016) on videos: outputs along three axes, and a step for each distance from the first frame's corner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ar_jax
from ar_jax.config import UsageError
from ar_jax.data.files import resolve
from ar_jax.evaluation import report
from ar_jax.feeds.protocol import Chunk
from ar_jax.heads.protocol import Sampling
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context
from ar_jax.run import build_run, load_data
from ar_jax.sampling.loop import drawn_from, generate, walk
from ar_jax.system import System

CONFIG = Path(__file__).parents[2] / "configs/nar_video.py:smoke"


def video(frames: int, side: int) -> System:
    return cases.tiny.__wrapped__(
        order="nearest",
        feed="neighbors",
        tokenizer=dict(kind="codes", grids=((frames, side, side),), vocab_size=3),
        model__branch_layers=(1, 1),
    )


def test_a_video_is_generated_as_it_was_trained() -> None:
    """Each token is answered by up to three tokens of the step before, in one pass or step by step."""
    system = video(2, 3)
    model, params, values = system.model, cases.tiny_params(system), cases.tokens(system, 2)
    plan, context = model.feed, model.context(None, 2, jnp.arange(2))

    @jax.jit
    def outputs(values: jax.Array) -> Any:
        whole = model.read(params, values, context, plan.parallel())[0]
        whole = plan.parallel().pick(whole)[:, np.argsort(plan.parallel().answers)]

        def one_step(carry: Any, step: Any, chunk: Chunk) -> Any:
            state, out = carry
            hidden, state = model.read(params, values, context, chunk, state)
            return state, out.at[:, chunk.answers].set(chunk.pick(hidden))

        start = model.generator.decoder.init_state(2, plan.max_len, plan.max_step_len)
        return whole, walk(plan, one_step, (start, jnp.zeros_like(whole)))[1]

    whole, stepwise = outputs(values)
    chex.assert_trees_all_close(whole, stepwise, atol=1e-4)  # float32, three layers of sums of 40 terms of order one
    assert {int((np.asarray(asked) >= 0).sum()) for asked in plan.parallel().asked[1:]} == {1, 2, 3}
    assert jnp.abs(outputs((values + 1) % 3)[0] - whole).max() > 0.1


@pytest.mark.parametrize(("frames", "side"), [(2, 3), (4, 3), pytest.param(3, 5, marks=pytest.mark.slow)])
def test_a_video_of_t_frames_of_n_by_n_takes_2n_plus_t_minus_2_evaluations(
    frames: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted while they run, not while they are compiled."""
    system, count, read = video(frames, side), [], Autoregressive.read

    def counted(
        self: Autoregressive, params: Any, values: jax.Array, context: Context, chunk: Chunk, *rest: Any
    ) -> Any:
        jax.debug.callback(lambda n: count.append(int(n)), jnp.asarray(chunk.answers).size)
        return read(self, params, values, context, chunk, *rest)

    monkeypatch.setattr(Autoregressive, "read", counted)
    context = system.model.context(None, 2, jnp.arange(2))
    drawn = jax.jit(lambda key: generate(system.model, cases.tiny_params(system), context, drawn_from(key), Sampling()))
    drawn(jax.random.key(0)).block_until_ready()
    jax.effects_barrier()
    assert len(count) == 2 * side + frames - 2 and sum(count) == frames * side**2


@pytest.mark.slow
def test_videos_of_moving_digits_are_drawn_shown_and_gone_on_with(tmp_path: Path) -> None:
    config = ar_jax.get_config(CONFIG)
    config.data.num_frames, config.data.side = 2, 8
    run, data = build_run(config), load_data(config)
    made = run.sample(labels=[3, 5])
    assert made.shape == (2, *data.shape) == (2, 2, 8, 8, 1)
    batch = data.test.take(np.arange(2))
    np.testing.assert_allclose(run.decode(run.encode(batch["video"])), batch["video"], atol=1e-6)
    first = np.zeros((2, 8, 8), bool)
    first[0] = True
    given = run.encode(batch["video"])
    went_on = run.sample(labels=batch["label"], given=given, given_mask=run.slots_within(first))
    np.testing.assert_allclose(went_on[:, 0], batch["video"][:, 0], atol=1e-6)
    with pytest.raises(UsageError, match="A region of 2 axes is none of videos; give 3"):
        run.slots_within(first[0])
    grid = report.sample_grid(run)
    assert grid.ndim == 3 and grid.shape[1] > 1.5 * grid.shape[0]  # ten rows of eight films, two frames wide


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["smoke", "clips"])
# imageio runs ffmpeg beside this process, and does not close its pipes.
@pytest.mark.filterwarnings("ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_videos_are_learned(variant: str, tmp_path: Path) -> None:
    """Of moving digits in 40 steps, and of real ones where they can be read: far below the nats of uniform tokens."""
    config = ar_jax.get_config(CONFIG.with_name(f"nar_video.py:{variant}"))
    if variant == "clips":
        pytest.importorskip("imageio_ffmpeg")
        if not resolve(config.data.path[0]).is_file():
            pytest.skip(f"no {config.data.path[0]} where $AR_JAX_DATA points to")
    config.mesh = dict(data=1)
    run = ar_jax.train(config, tmp_path)
    metrics = report.held_out(run, load_data(config))
    assert metrics["bits_per_dim"] < 0.75 * np.log2(17)
