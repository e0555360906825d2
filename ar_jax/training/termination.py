"""SIGTERM as a request: the trainer saves and leaves at its next safe point."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # 143, as shells report a process that SIGTERM has ended


class Terminated(Exception):
    """SIGTERM came during something that need not be finished."""


class Termination:
    """Notes SIGTERM while its context lasts. Only a main thread can: elsewhere SIGTERM keeps its old meaning.

    Where several processes are one run, JAX hears the SIGTERM of any of them and tells all the same step to leave at.
    """

    def __init__(self) -> None:
        """Nothing requested yet."""
        self.requested = False
        self._interruptible = False
        self._shared = jax.process_count() > 1

    def requested_at(self, step: int) -> bool:
        """Whether to leave after this step; to be asked once after each."""
        return multihost_utils.reached_preemption_sync_point(step) if self._shared else self.requested

    def __enter__(self) -> Termination:
        self._is_main = not self._shared and threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._previous)

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Lets SIGTERM break off what happens inside; `requested` is set afterwards."""
        self._interruptible = True
        try:
            yield
        except Terminated:
            pass
        finally:
            self._interruptible = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._interruptible:
            raise Terminated
