"""Every config file builds in every variant, and every smoke variant learns."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import published
import pytest

from ar_jax import systems
from ar_jax.config import UsageError, get_config
from ar_jax.data import pipeline
from ar_jax.data.protocol import Facts
from ar_jax.run import load_data
from ar_jax.system import from_config
from ar_jax.training.program import make_program

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
NAMES = [
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in sorted([*CONFIGS.glob("*.py"), *CONFIGS.glob("mixers/*.py")])
]
if str(ROOT) not in sys.path:  # `pytest` alone does not look where `python -m pytest` does
    sys.path.insert(0, str(ROOT))
VARIANTS = [(name, v) for name in NAMES for v in importlib.import_module(f"configs.{name.replace('/', '.')}").VARIANTS]
BUILT_HERE = [(name, v) for name, v in VARIANTS if f"{name}:{v}" not in published.NAMES]  # see test_published_sizes.py
STEPS = 12


def facts_of(config) -> Facts:
    """What the data of a config is; of data that has to be fetched first, without fetching it."""
    if config.data.kind == "tfds":
        return published.facts_of(config)
    if config.data.kind == "token_shards" and config.data.path.endswith("/oar"):  # ImageNet
        return Facts("image", (256, 256, 3), 256, tuple(map(str, range(1000))))
    if config.data.kind == "crops" and config.data.get("path"):  # videos, which not every machine can read
        shape = (config.data.num_frames, config.data.height, config.data.width, 1)
        return Facts("video", shape, 256, tuple(config.data.path))
    if config.data.kind in ("idx", "token_shards"):  # Fashion-MNIST
        return Facts("image", (28, 28, 1), 256, tuple(map(str, range(10))))
    if config.data.kind == "molecules" and config.data.path:  # QM9 and ZINC250k take long to read
        side, levels = (38, 13) if "zinc" in config.data.path else (9, 9)
        return Facts("image", (side, side, 1), levels)
    return load_data(config)


# Configs share recipes, networks and objectives: these stand for all, which a long test trains.
TRAINED_HERE = ("digits", "digits_masked", "bytes", "llamagen", "var", "mar", "rar", "arpg", "npp")
TRAINED_HERE += ("mixers/gss", "mixers/mamba", "mixers/seer_attention")


def slow(name: str) -> Any:
    """A long test's row."""
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "variant"), BUILT_HERE)
def test_every_variant_builds_and_has_an_optimizer(name, variant):
    config = get_config(ROOT / f"configs/{name}.py:{variant}")
    system = from_config(config, facts_of(config))
    shapes = make_program(system, config).shapes  # by jax.eval_shape: nothing is allocated
    assert all(leaf.size for leaf in jax.tree.leaves(shapes.params))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_base_and_a_smoke_variant_and_tells_the_nearest_to_a_wrong_one(name):
    assert {"base", "smoke"} <= {v for n, v in VARIANTS if n == name}
    assert get_config(ROOT / f"configs/{name}.py") == get_config(ROOT / f"configs/{name}.py:base")
    with pytest.raises(UsageError, match="smoky.*Did you mean 'smoke'"):
        get_config(ROOT / f"configs/{name}.py:smoky")


@pytest.mark.parametrize("name", [name if name in TRAINED_HERE else slow(name) for name in NAMES])
def test_every_smoke_variant_learns_in_a_few_steps(name):
    config = get_config(ROOT / f"configs/{name}.py:smoke")
    config.mesh = dict(data=1)
    config.train.batch_size = 16
    data = load_data(config)
    program = make_program(from_config(config, data), config)
    iterator = pipeline.train_iterator(data, config.train.batch_size, config.seed)
    state, losses = program.init(), []
    compiled = program.compile(program.put(next(iterator)))
    for _ in range(STEPS):
        state, metrics = compiled(state, program.put(next(iterator)))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05, losses


def test_what_is_said_to_run_has_a_smoke_variant():
    claimed = {s.config for s in systems.load().values() if s.status != "planned"}
    folders = ("classifiers", "agents")  # see test_classifiers.py and test_agents.py
    elsewhere = {f"configs/{folder}/{path.name}" for folder in folders for path in CONFIGS.glob(f"{folder}/*.py")}
    assert claimed <= {f"configs/{name}.py" for name, variant in VARIANTS if variant == "smoke"} | elsewhere
