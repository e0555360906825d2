"""Kills runs at random moments, and sees what is left: python benchmarks/faults.py [--kills 24 16 12] [--out docs].

Runs of the digits config on four CPU devices, in 1, 2 and 4 processes, are killed again and again: a trainer at any moment, a
trainer while it writes a checkpoint, a process that prepares its data, politely, by SIGTERM to one process, or one of several
is stopped for good. After each the other processes have to end by themselves, and the same command has to go on. A run that
reaches its end has to have the parameters of one that was never disturbed, to the bit. Writes reliability.md. Some twenty
minutes on two cores.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import ar_jax  # noqa: E402
from ar_jax.training import hosts  # noqa: E402
from ar_jax.training.paths import named_leaves  # noqa: E402

ROOT = Path(__file__).parents[1]
DEVICES, NUM_STEPS, EVERY_STEPS = 4, 1000, 50
RUN = (
    "--config=configs/digits.py:smoke",
    f"--config.train.num_steps={NUM_STEPS}",
    "--config.train.log_every_steps=1",
    f"--config.checkpoint.every_steps={EVERY_STEPS}",
    "--config.data.num_workers=1",
    "--config.train.stuck_seconds=60",
)
KINDS = {
    "trainer": 6,
    "writer": 6,
    "data": 4,
    "SIGTERM": 4,
    "stuck": 1,
}  # of so many parts; only of several one is stuck
WORDS = {
    "trainer": "a trainer",
    "writer": "a trainer writing a checkpoint",
    "data": "a data process",
    "SIGTERM": "SIGTERM",
    "stuck": "a trainer stopped for good",
}
COLUMNS = (
    "runs that came to their end",
    "of them with the same bits as one never disturbed",
    "most steps lost",
    "longest until all had ended, s",
    "ended without a word",
)
MOST_SECONDS = 7 * hosts.TIMEOUT  # JAX itself waits 300 s for all to join


def start(workdir: Path, count: int) -> list[subprocess.Popen[bytes]]:
    """The processes of a run, their output in files beside its directory."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    processes = []
    for i in range(count):
        several = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={i}"] if count > 1 else []
        with output(workdir, i).open("wb") as file:
            command = [sys.executable, "train.py", *RUN, f"--workdir={workdir}", *several]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
    return processes


def output(workdir: Path, process: int) -> Path:
    """What a process has said."""
    return workdir.parent / f"{workdir.name}.{process}.txt"


def steps_noted(workdir: Path) -> int:
    """The newest step in metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    found = re.findall(r'^\{"step": (\d+)', file.read_text(errors="replace"), re.MULTILINE) if file.exists() else []
    return max(map(int, found), default=0)


def resumed_after(workdir: Path) -> int | None:
    """The step after which the run says that it went on; None before it has said anything."""
    said = re.search(r"^steps: .*", output(workdir, 0).read_text(errors="replace"), re.MULTILINE)
    if said is None:
        return None
    found = re.search(r"resumed after step (\d+)", said[0])
    return int(found[1]) if found else 0


def data_processes(pid: int) -> list[int]:
    """The processes of a trainer that prepare data: its children that run a target of Python's multiprocessing."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            children = [int(child) for child in file.read_text().split()]
            found += [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return found


def strike(kind: str, workdir: Path, processes: list[subprocess.Popen[bytes]], rng: random.Random) -> bool:
    """Waits for the moment, and kills; False where the run has ended before."""

    def until(ready: Any, seconds: float) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(p.poll() is None for p in processes):
            if found := ready():
                return found
            time.sleep(0.005)
        return None

    victim = rng.choice(processes)
    if kind != "trainer" or rng.random() < 0.75:  # a quarter of the trainers die while they start, or restore
        noted = steps_noted(workdir) if resumed_after(workdir) is not None else None
        until(lambda: resumed_after(workdir) is not None and steps_noted(workdir) != noted, 120)
    until(lambda: False, rng.uniform(0, 6))
    target = victim.pid
    if kind == "writer" and until(lambda: list((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")), 60):
        time.sleep(rng.uniform(0, 0.1))
    if kind == "data":
        found = until(lambda: data_processes(victim.pid), 60)
        if not found:
            return False
        target = rng.choice(found)
    if any(p.poll() is not None for p in processes):
        return False
    os.kill(target, {"SIGTERM": signal.SIGTERM, "stuck": signal.SIGSTOP}.get(kind, signal.SIGKILL))
    if kind == "stuck":  # it stays as it is until the others have ended, or have not
        ended([process for process in processes if process is not victim])
        victim.kill()
    return True


def ended(processes: list[subprocess.Popen[bytes]], most: float = MOST_SECONDS) -> float:
    """Seconds until all processes had ended; infinite where one of them hung longer than `most`, and all are then killed."""
    begin = time.monotonic()
    for process in processes:
        try:
            process.wait(None if most == float("inf") else max(0.1, begin + most - time.monotonic()))
        except subprocess.TimeoutExpired:
            for one in processes:
                one.kill()
                one.wait()
            return float("inf")
    return time.monotonic() - begin


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """Of a finished run."""
    run = ar_jax.load(workdir)
    if run.step != NUM_STEPS:
        sys.exit(f"{workdir} has come to step {run.step} of {NUM_STEPS} only.")
    return {name: np.asarray(leaf) for name, leaf in named_leaves(run.params).items()}


def campaign(
    folder: Path, count: int, kills: int, rng: random.Random, undisturbed: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Kills runs of so many processes so often, and lets the last one come to its end."""
    struck: collections.Counter[str] = collections.Counter()
    lost, seconds, finished, same, unsaid = 0, 0.0, 0, 0, 0
    deck: list[str] = []
    while sum(struck.values()) < kills:
        workdir, done = folder / f"{count}-{finished}", False
        while not done:
            noted, processes = steps_noted(workdir), start(workdir, count)
            if not deck:  # dealt like cards, so that every kind has its share
                deck = [kind for kind, weight in KINDS.items() for _ in range(weight) if count > 1 or kind != "stuck"]
                rng.shuffle(deck)
            kind = deck[-1]
            hit = sum(struck.values()) < kills and strike(kind, workdir, processes, rng)
            if hit:
                deck.pop()
                seconds = max(seconds, ended(processes))
                struck[kind] += 1
                said = "".join(output(workdir, i).read_text(errors="replace") for i in range(count))
                # Who was not killed has to say why it ends, unless it has come to the end of the run.
                others = count > 1 or kind not in ("trainer", "writer")
                early = any(process.returncode for process in processes)
                unsaid += others and early and not re.search(r"error|Error|SIGTERM", said)
            else:
                ended(processes, float("inf"))
            if (again := resumed_after(workdir)) is not None:
                lost = max(lost, noted - again)
            done = all(process.returncode == 0 for process in processes)
            codes = [process.returncode for process in processes]
            what = f"{kind if hit else 'no kill'}, {sum(struck.values())} of {kills}; noted {steps_noted(workdir)}"
            print(f"{count} processes: {what}, resumed after {again}, exit codes {codes}", flush=True)
            if not hit and not done:
                sys.exit(f"A run that was not killed failed: {output(workdir, 0).read_text(errors='replace')[-2000:]}")
        finished += 1
        found = parameters(workdir)
        same += all(np.array_equal(values, undisturbed[name]) for name, values in found.items())
    return dict(
        processes=count, struck=dict(struck), lost=lost, seconds=seconds, finished=finished, same=same, unsaid=unsaid
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "<!-- written by: python benchmarks/faults.py -->",
        "",
        f"Runs of the digits config on {DEVICES} CPU devices, {NUM_STEPS} steps with a checkpoint every {EVERY_STEPS}, were "
        "killed at random moments and started again by the same command, until so many kills were done; the last run of each "
        "row went on to its end. Steps lost are those that had been noted and were trained again: training goes on while a "
        "checkpoint is written, so that a writer's death costs the interval and what was done meanwhile. A process whose peers "
        f"died before they had joined waits for them, JAX's five minutes long; after {MOST_SECONDS} seconds it was ended here.",
        "",
        f"| {' | '.join(('processes', *(WORDS[kind] for kind in KINDS), *COLUMNS))} |",
        f"| {' | '.join(['---'] * (1 + len(KINDS) + len(COLUMNS)))} |",
    ]
    for row in rows:
        cells = [row["processes"], *(row["struck"].get(kind, 0) for kind in KINDS)]
        longest = f"more than {MOST_SECONDS}" if row["seconds"] == float("inf") else f"{row['seconds']:.0f}"
        cells += [row["finished"], row["same"], row["lost"], longest, row["unsaid"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, nargs=3, default=[24, 16, 12], help="of runs in 1, 2 and 4 processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    rng, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        for count, kills in zip((1, 2, 4), arguments.kills, strict=True):
            # Of as many processes: how sums over devices are rounded depends on which of them share one.
            quiet = Path(folder) / f"{count}-undisturbed"
            ended(start(quiet, count), float("inf"))
            undisturbed = parameters(quiet)
            rows.append(campaign(Path(folder), count, kills, rng, undisturbed))
            print(json.dumps(rows[-1]), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "reliability.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
