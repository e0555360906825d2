"""What a run says while it goes: metrics.jsonl, TensorBoard, and a bar or lines for whoever watches."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rich.console
import rich.progress
import tensorboardX

from ar_jax.training.workdir import write_atomically


class Progress(Protocol):
    """Shows how far a run is."""

    def update(self, step: int, loss: float, examples_per_second: float) -> None:
        """Shows one more measurement."""
        ...

    def close(self) -> None:
        """Leaves the terminal as it should be."""
        ...


def make_progress(start: int, num_steps: int, console: rich.console.Console | None = None) -> Progress:
    """A bar where it can move (a terminal, a notebook that has widgets), lines elsewhere."""
    console = console or rich.console.Console()
    has_widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return Bar(start, num_steps, console) if console.is_terminal or has_widgets else Lines(start, num_steps)


def drop_lines_after(file: Path, step: int) -> None:
    """Keeps of a metrics file only the whole lines of steps up to `step`: a resumed run writes the others again."""
    if not file.exists():
        return
    kept = [line for line in file.read_text(errors="replace").splitlines() if _step_of(line) <= step]
    write_atomically(file, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # half written when the process was killed
        return float("inf")


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Recorder:
    """Writes metrics and images of a run's steps, and shows its progress."""

    def __init__(
        self,
        workdir: Path,
        start: int,
        num_steps: int,
        work: Mapping[str, float],
        peak_flops: float | None = None,
        progress: Progress | None = None,
    ):
        """Drops what an earlier process wrote about steps after `start`, and goes on from there.

        Args:
          workdir: of the run.
          start: steps done.
          num_steps: of the run.
          work: what a step does, by name: "examples", and "tokens" or "flops" where they are known.
          peak_flops: FLOP/s of all devices together, to compare with; None where it is not known.
          progress: shows it; chosen by where the output goes if None.
        """
        drop_lines_after(workdir / "metrics.jsonl", start)
        self._file = (workdir / "metrics.jsonl").open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._progress = progress or make_progress(start, num_steps)
        self._work, self._peak_flops = work, peak_flops
        self._last = (start, time.monotonic())

    def metrics(self, step: int, metrics: Mapping[str, float], asked: float | None = None) -> None:
        """Writes the metrics of one step, each step once, and the speed since the one before.

        That is `seconds_per_step`, `examples_per_second` and so on for all work, and `mfu`, the model's FLOP/s as a share of
        what the devices could do.

        Args:
          step: the step.
          metrics: by name.
          asked: when devices were asked for it (`time.monotonic`); metrics are read later, several steps at once.
        """
        last_step, last_time = self._last
        self._last = (step, time.monotonic() if asked is None else asked)
        per_step = max(self._last[1] - last_time, 1e-9) / max(step - last_step, 1)
        rates = {f"{name}_per_second": count / per_step for name, count in self._work.items()}
        rates["seconds_per_step"] = per_step
        if self._peak_flops and "flops" in self._work:
            rates["mfu"] = rates["flops_per_second"] / self._peak_flops
        line = {"step": step, **metrics, **rates}
        finite = {name: value if np.isfinite(value) else None for name, value in line.items()}  # JSON has no NaN
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self._progress.update(step, metrics["loss"], rates["examples_per_second"])

    def image(self, step: int, image: np.ndarray) -> None:
        """Writes an image [H, W, 3] uint8 to TensorBoard."""
        self._board.add_image("samples", image, step, dataformats="HWC")

    def close(self) -> None:
        """Closes files and progress."""
        self._progress.close()
        self._board.close()
        self._file.close()


class Lines:
    """Progress as plain lines, for logs and pipes."""

    def __init__(self, start: int, num_steps: int):
        """Progress of steps `start` to `num_steps`."""
        self._start, self._num_steps, self._begin = start, num_steps, time.monotonic()

    def update(self, step: int, loss: float, examples_per_second: float) -> None:
        """Prints a line."""
        per_step = (time.monotonic() - self._begin) / max(1, step - self._start)
        left = _seconds(per_step * (self._num_steps - step))
        print(
            f"step {step}/{self._num_steps}  loss {loss:.4f}  {examples_per_second:.0f} examples/s  ETA {left}",
            flush=True,
        )

    def close(self) -> None:
        """Nothing: every line is out."""


class Bar:
    """Progress as a bar that moves in place."""

    def __init__(self, start: int, num_steps: int, console: rich.console.Console):
        """Progress of steps `start` to `num_steps`."""
        columns: list[Any] = [
            "step {task.completed:.0f}/{task.total:.0f}",
            rich.progress.BarColumn(),
            "loss {task.fields[loss]}",
        ]
        columns += ["{task.fields[speed]} examples/s", "ETA", rich.progress.TimeRemainingColumn()]
        self._bar = rich.progress.Progress(*columns, console=console)
        self._task = self._bar.add_task("train", total=num_steps, completed=start, loss="-", speed="-")
        self._bar.start()

    def update(self, step: int, loss: float, examples_per_second: float) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", speed=f"{examples_per_second:.0f}")

    def close(self) -> None:
        """Stops redrawing."""
        self._bar.stop()
