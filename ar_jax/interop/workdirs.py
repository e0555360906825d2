"""A directory as train.py leaves it, from parameters that came from elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax.data import pipeline
from ar_jax.data.protocol import Dataset, Example, Facts
from ar_jax.run import FACTS
from ar_jax.system import System
from ar_jax.tokenizer_system import TokenizerSystem
from ar_jax.training import checkpoints
from ar_jax.training.program import Program, make_program
from ar_jax.training.state import TrainState, create_state
from ar_jax.training.workdir import plain_values, write_atomically


class _Unread:
    """A source that has a length and is not read: a position before the first batch is the same for all sources."""

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def take(self, indices: np.ndarray) -> Example:
        raise NotImplementedError


def write_run(directory: Path, config: Any, system: System | TokenizerSystem, facts: Facts, params: Any) -> None:
    """Writes config, facts and a checkpoint of step 0: eval.py reads it, and train.py goes on from it.

    Args:
      directory: an empty directory.
      config: the whole config.
      system: what the config builds.
      facts: what the data is.
      params: numpy, as `system.init` gives them.

    Raises:
      UsageError: something in the config is not as it should be.
    """
    program = make_program(system, config)
    known = {field.name: getattr(facts, field.name) for field in dataclasses.fields(Facts)}
    source = _Unread(program.train.batch_size)
    iterator = pipeline.train_iterator(
        Dataset(**known, train=source, test=source), program.train.batch_size, program.seed
    )
    write_atomically(directory / "config.json", json.dumps(plain_values(config), indent=2) + "\n")
    write_atomically(directory / FACTS, json.dumps(known))
    with contextlib.closing(checkpoints.open_manager(directory / "checkpoints")) as manager:
        checkpoints.save(manager, start(program, params), iterator)
        manager.wait_until_finished()


def start(program: Program, params: Any) -> TrainState:
    """The state before the first step, with these parameters; the average, where there is one, starts there, too."""

    def create(params: Any) -> TrainState:
        task: Any = types.SimpleNamespace(init=lambda key: params, frozen=program.task.frozen)
        return create_state(task, program.optimizer, program.seed, program.train.ema_decay > 0)

    shardings = jax.tree.map(lambda x: x.sharding, program.shapes)
    placed = jax.tree.map(jax.device_put, params, shardings.params)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(placed)
