"""Gated state spaces in a language model: what was learned on short texts holds for long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

import ar_jax
from ar_jax import run as runs
from ar_jax.evaluation import report
from ar_jax.training.paths import named_leaves

CONFIG = Path(__file__).parents[2] / "configs/mixers/gss.py"


def test_layers_of_state_spaces_and_of_attention_in_blocks_take_turns_and_know_no_places() -> None:
    """So they read longer texts with the same parameters."""
    config = ar_jax.get_config(f"{CONFIG}:smoke")
    run = ar_jax.build_run(config)
    other, data = runs.on_other_data(run)
    names = " ".join(named_leaves(run.params))
    assert "block_0/mixer/poles" in names and "block_1/mixer/distance" in names
    assert data.shape == (4 * config.data.length,) and other.params is run.params
    assert config.model.mixer.transformer_xl.segment_length < config.data.length  # attention is local


@pytest.mark.slow
def test_bits_of_a_byte_are_no_more_in_texts_four_times_as_long(tmp_path: Path) -> None:
    config = ar_jax.get_config(f"{CONFIG}:longer")
    config.mesh = dict(data=1)
    run = ar_jax.train(config, tmp_path)
    other, data = runs.on_other_data(run)
    short = report.held_out(run, runs.load_data(run.config))["bits_per_dim"]
    long = report.held_out(other, data)["bits_per_dim"]
    assert short < 4.2  # 8 if nothing is known, 4.8 if how often a byte comes is known
    assert long < short + 0.01
