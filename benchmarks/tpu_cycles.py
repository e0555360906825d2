"""How many cycles a TPU kernel takes, read from what the compiler wrote: python benchmarks/tpu_cycles.py DIR [--kernel NAME].

DIR is what `LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"` made the compiler write. A kernel's final
program is a list of bundles, one a cycle; what stands in a loop counts as often as its exit test says. Blocks that a
kernel leaves out at run time count as done, and waiting for memory does not count: compare with bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

_FILE = re.compile(r"\d+-(?P<kernel>.+?)-\d+-packed-bundles-post-ra\.txt")
_BUNDLE = re.compile(r"^\s*(?P<number>0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s?[> ]*\{")
_BRANCH = re.compile(r"sbr\.rel[^}]*?target bundleno = (?P<target>\d+)")
_EXIT = re.compile(r"scmp\.(?:ge|eq)\.s32\.totalorder\s+\S+,\s*(?P<trips>\d+)\s*/\*[^*]*loop exit test")
_EXIT_NEAR = 400  # bundles before its back branch that a loop's exit test is looked for in


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a kernel: its first and last bundle, and how often it runs, None if the compiler does not know."""

    first: int
    last: int
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's final program.

    Attributes:
      bundles: how many there are.
      cycles: bundles, each as often as the loops around it run; loops of unknown length count once.
      loops: all loops.
    """

    bundles: int
    cycles: int
    loops: tuple[Loop, ...]


def schedules(folder: Path) -> dict[str, Schedule]:
    """The kernels whose programs lie in a folder, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match and not match["kernel"].startswith(("TLP", "<late")) and "schedule-analysis" not in path.name:
            found[match["kernel"]] = read(path.read_text(errors="replace"))
    return found


def read(text: str) -> Schedule:
    """The schedule that one file tells."""
    numbers: list[int] = []
    bodies: list[str] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            numbers.append(int(match["number"], 16))
            bodies.append(line)
        elif bodies:
            bodies[-1] += line
    loops = tuple(
        Loop(int(branch["target"]), number, _trips(bodies, i))
        for i, (number, body) in enumerate(zip(numbers, bodies, strict=True))
        for branch in _BRANCH.finditer(body)
        if int(branch["target"]) <= number
    )
    cycles = 0
    for number in numbers:
        weight = 1
        for loop in loops:
            if loop.first <= number <= loop.last:
                weight *= loop.trips or 1
        cycles += weight
    return Schedule(len(numbers), cycles, loops)


def _trips(bodies: list[str], last: int) -> int | None:
    """How often the loop runs that ends in bundle number `last`."""
    for i in range(last, max(-1, last - _EXIT_NEAR), -1):
        match = _EXIT.search(bodies[i])
        if match:
            return int(match["trips"])
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--kernel", default="", help="only kernels whose names contain this")
    options = parser.parse_args()
    for name, schedule in schedules(options.folder).items():
        if options.kernel in name:
            print(f"{name}: {schedule.cycles:,} cycles, {schedule.bundles:,} bundles")
            for loop in schedule.loops:
                print(f"  bundles {loop.first} to {loop.last}, {loop.trips or 'unknown'} times")
