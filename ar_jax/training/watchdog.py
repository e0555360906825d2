"""Ends a process that waits for ever, for a peer, for data or for a network that does not answer."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator


class Watchdog:
    """Ends the process when, while its context lasts, no step moves for so many seconds.

    A dead process is noticed by the others (see hosts.py). One that lives but does not go on is not: the others wait in a
    collective that it never joins, and no exception can reach them there.
    """

    def __init__(self, seconds: float, leave: Callable[[str], None] | None = None):
        """`leave` is called with the sentence instead of ending the process."""
        self._seconds, self._leave = seconds, leave or _exit
        self._last = time.monotonic()
        self._paused = 0
        self._over = threading.Event()

    def moved(self) -> None:
        """A step has been asked for, or has ended."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what may take long: evaluation, and waiting for a file system."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.moved()

    def __enter__(self) -> Watchdog:
        self.moved()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 10)):
            if not self._paused and time.monotonic() - self._last > self._seconds:
                self._leave(
                    f"No step has ended for {self._seconds} seconds (config.train.stuck_seconds): another process, the data "
                    "or the network is stuck. The same command, on all hosts, goes on from the last checkpoint."
                )
                return


def _exit(sentence: str) -> None:
    """The main thread may be inside a call that never returns: no exception, no cleaning up."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
