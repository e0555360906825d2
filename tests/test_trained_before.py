"""A generator on a tokenizer that was trained before, and a run that starts from another run's parameters."""

from __future__ import annotations

from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import ar_jax
from ar_jax.config import UsageError

ROOT = Path(__file__).parents[1]


def small(name: str, num_steps: int = 1):
    """A smoke variant that is over soon."""
    config = ar_jax.get_config(ROOT / f"configs/{name}.py:smoke")
    config.train.update(num_steps=num_steps, batch_size=8)
    config.schedule.warmup_steps = 0
    return config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with a tokenizer of a single step."""
    workdir = tmp_path_factory.mktemp("tokenizer")
    ar_jax.train(small("tokenizers/vqgan"), workdir)
    return workdir


@pytest.fixture(scope="module")
def generator(tokenizer, tmp_path_factory):
    """A directory with a generator of its tokens."""
    workdir, config = tmp_path_factory.mktemp("generator"), small("llamagen")
    config.tokenizer = dict(workdir=str(tokenizer))
    ar_jax.train(config, workdir)
    return workdir


def test_a_generator_takes_the_tokenizer_of_a_directory_and_leaves_it_as_it_is(tokenizer, generator):
    trained, run = ar_jax.load(tokenizer), ar_jax.load(generator)
    chex.assert_trees_all_equal(run.params["tokenizer"], trained.params["tokenizer"])
    assert run.config.tokenizer.kind == "autoencoder"  # written out: the run needs the tokenizer's directory no more
    images = run.sample(labels=[1, 2])
    assert images.shape == (2, 8, 8, 1) and np.abs(images).max() <= 1
    np.testing.assert_array_equal(run.encode(images), trained.encode(images))


def test_a_run_starts_from_another_runs_parameters(generator, tmp_path):
    config = small("llamagen")
    config.tokenizer = ar_jax.load(generator).config.tokenizer
    config.train.init_from = str(generator)
    config.optimizer = dict(kind="sgd", learning_rate=1e-12)
    started, before = ar_jax.train(config, tmp_path / "on"), ar_jax.load(generator)
    chex.assert_trees_all_close(started.params, before.params, atol=1e-6)  # one step of next to no length
    fresh = ar_jax.build_run(small("llamagen"))
    assert not jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((a == b).all()),
            fresh.params["generator"]["decoder"],
            before.params["generator"]["decoder"],
        )
    )


@pytest.mark.parametrize("key", ["tokenizer.workdir", "train.init_from"])
def test_a_directory_without_a_run_is_told_before_anything_is_written(key, tmp_path):
    config = small("llamagen")
    section, name = key.split(".")
    config[section][name] = str(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"nothing/config\.json does not exist"):
        ar_jax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_generators_directory_is_no_tokenizers(generator, tmp_path):
    config = small("llamagen")
    config.tokenizer = dict(workdir=str(generator))
    with pytest.raises(UsageError, match="holds no tokenizer"):
        ar_jax.train(config, tmp_path / "run")
