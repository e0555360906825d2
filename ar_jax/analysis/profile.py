"""Where a program's time goes, operation by operation, read from the trace of a run."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

# Lines of a trace on which each operation of a program is an event: of TPUs and GPUs, and of a CPU's threads; a small program
# runs on the thread that calls it, which has the name of its process and no number.
_DEVICE_LINES = re.compile(r".*: (XLA Ops|Stream #.*)|/host:CPU: (tf_XLA(PjRtCpuClient|TfrtCpuClient|Eigen)/.*|[^/]*)")
_OPERATION = re.compile(r"[a-z][a-z0-9_.-]*")
# What contains other operations, whose time would count twice.
_CONTAINERS = re.compile(r"(while|conditional|cond|call|async)\b.*")
_PRODUCT = re.compile(r" (dot|convolution)\(|custom_call_target=\"[^\"]*(matmul|gemm|conv|Dot)", re.IGNORECASE)
_DEFINITION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")


def operations(trace: Path | str) -> dict[str, float]:
    """Seconds of each operation, over all calls and devices, longest first.

    Args:
      trace: directory that `jax.profiler.trace` wrote.

    Raises:
      FileNotFoundError: there is no trace in it.
    """
    files = sorted(Path(trace).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"There is no trace in {trace}; write one with jax.profiler.trace({str(trace)!r}).")
    seconds: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            if _DEVICE_LINES.fullmatch(f"{plane.name}: {line.name}"):
                for event in line.events:
                    name = event.name.removeprefix("%").split(" ")[0]
                    if _OPERATION.fullmatch(name) and not _CONTAINERS.fullmatch(name):
                        seconds[name] += event.duration_ns / 1e9
    return dict(seconds.most_common())


def trace(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each operation while `run` runs; it has been compiled before, and its arrays are waited for."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        return operations(folder)


def by_kind(seconds: Mapping[str, float], program: str) -> dict[str, float]:
    """Seconds of matrix products and convolutions, of moving numbers, and of everything else.

    Args:
      seconds: of each operation.
      program: the compiled program's text, `compiled.as_text()`, which tells what an operation contains.
    """
    kinds = dict.fromkeys(("products", "moves", "others"), 0.0)
    defined = {match[1]: match[0] for line in program.splitlines() if (match := _DEFINITION.match(line))}
    products = _with_products(program)
    for name, time in seconds.items():
        line = defined.get(name, name)
        called = set(_CALLED.findall(line))
        if called & products or _PRODUCT.search(line):
            kinds["products"] += time
        else:
            kinds[
                "moves"
                if re.match(r"(wrapped_)?(copy|transpose|slice|gather|concatenate|dynamic|pad)", name)
                else "others"
            ] += time
    return kinds


def _with_products(program: str) -> set[str]:
    """The computations that contain a product, themselves or by a call."""
    bodies: dict[str, str] = {}
    name = ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
        bodies[name] = bodies.get(name, "") + line + "\n"
    found = {name for name, body in bodies.items() if _PRODUCT.search(body)}
    while more := {n for n, body in bodies.items() if n not in found and set(_CALLED.findall(body)) & found}:
        found |= more
    return found
