"""Traces a few steps of a run, for XProf and TensorBoard, and says what takes the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from ar_jax.analysis import profile

FIRST = 2  # the first steps of a process still allocate
SHOWN = 5


class Tracing:
    """Traces steps FIRST to FIRST + num_steps - 1 of those of this process into a directory."""

    def __init__(self, directory: Path, num_steps: int):
        """Nothing is traced where num_steps is 0."""
        self._directory, self._num_steps, self._runs = directory, num_steps, False

    def before(self, index: int, state: Any) -> None:
        """To be called before each step, with its number among those of this process, and what it waits for."""
        if self._num_steps and index == FIRST:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._runs = True
        if self._runs and index == FIRST + self._num_steps:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace, if it is on, and prints the operations that took the longest."""
        if not self._runs:
            return
        self._runs = False
        jax.profiler.stop_trace()
        if jax.process_index():
            return
        seconds = profile.operations(self._directory)
        whole = sum(seconds.values())
        print(
            f"profile: {self._directory} (tensorboard --logdir shows it); the longest operations of {self._num_steps} steps:"
        )
        for name, time in list(seconds.items())[:SHOWN]:
            print(f"  {time / whole:6.1%}  {1e3 * time / self._num_steps:9.3f} ms a step  {name}", flush=True)
