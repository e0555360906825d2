"""What a compiled program moves between devices and how long its compiler thinks it takes, read from its text."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?$")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_MEMORY = re.compile(r'"memory_access_time_us":([\d.e+-]+),"name":"(?!sol")')
_KERNEL = re.compile(r' custom-call(?:-start)?\(.*op_name="(?:[^"]*/)?([^"/]+)/pallas_call"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"[su]32\[\][^=]* constant\((\d+)\)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? ?\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same axes.

    Attributes:
      kind: one of KINDS.
      axes: axes of the mesh that its groups run along, joined by " x "; "?" where they are none of the mesh's.
      count: how often it runs in one run of the program.
      bytes: what a device sends in them, by the best ring.
      across: of that, what it sends to other nodes, where each node gathers first what its own devices have.
    """

    kind: str
    axes: str
    count: int
    bytes: int
    across: int = 0


class Program:
    """A compiled program, as text.

    Args:
      text: `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        """Cuts the text into its computations."""
        self._bodies: dict[str, list[str]] = {}
        self._entry = ""
        name = ""
        for line in text.splitlines():
            if (match := _HEADER.match(line)) and not line.startswith("HloModule"):
                name = match[1]
                self._bodies[name] = []
                if line.startswith("ENTRY"):
                    self._entry = name
            elif name:
                self._bodies[name].append(line)

    def seconds(self, clock: float) -> float | None:
        """Seconds of one run, by the compiler's estimate of each fusion; kernels, library calls and collectives have none.

        Of a fusion for GPUs what it takes to read and write memory, by the least of the compiler's estimates.

        Args:
          clock: cycles/s.

        Returns:
          None where the text has no estimates.
        """

        @functools.cache
        def of(name: str) -> float:
            total = 0.0
            for line in self._bodies.get(name, ()):
                if match := _CYCLES.search(line):
                    total += int(match[1]) / clock
                if estimates := _MEMORY.findall(line):
                    total += min(map(float, estimates)) / 1e6
                if " fusion(" not in line:
                    inner = [of(called) for called in _called(line)]
                    total += self._trips(line) * (max(inner) if " conditional(" in line else sum(inner)) if inner else 0
            return total

        return of(self._entry) or None

    def kernels(self) -> dict[str, int]:
        """How often each Pallas kernel runs in one run of the program, by its name."""
        found: collections.Counter[str] = collections.Counter()
        for _, times, line in self._walk(self._entry, 1):
            if match := _KERNEL.search(line):
                found[match[1]] += times
        return dict(found)

    def collectives(self, mesh: Mapping[str, int], node: int = 0) -> list[Collective]:
        """All collectives, those that send most first.

        Args:
          mesh: size of each axis, outermost first.
          node: so many devices after each other are in one node; 0 for all.
        """
        node = node or math.prod(mesh.values())
        channels: dict[tuple[str, str, str], tuple[int, int, int]] = {}
        for number, (name, times, line) in enumerate(self._walk(self._entry, 1)):
            if (operation := _OPERATION.match(line)) and (match := _COLLECTIVE.match(operation[2])):
                axes, group = _axes(line, mesh, node)
                whole = _total(_result(operation[1]) if match[2] and match[1] != "all-reduce" else operation[1])
                # TPUs write a reduce-scatter as a sum of which each device keeps its part.
                kind, whole = (
                    ("reduce-scatter", whole // len(group)) if "all-reduce-scatter" in name else (match[1], whole)
                )
                own = times, times * _sent(kind, whole, len(group)), times * _sent_across(kind, whole, group // node)
                # They spread one collective over several fusions, in each of which it stands with the same channel.
                channel = _CHANNEL.search(line) if "fus" in name else None
                key = (kind, axes, f"{channel[0]}, {_ARRAY.findall(operation[1])}" if channel else f"line {number}")
                channels[key] = max(channels.get(key, own), own)
        found: dict[tuple[str, str], list[tuple[int, int, int]]] = collections.defaultdict(list)
        for (kind, axes, _), own in channels.items():
            found[kind, axes].append(own)
        rows = [Collective(kind, axes, *map(sum, zip(*each, strict=True))) for (kind, axes), each in found.items()]
        return sorted(rows, key=lambda row: -row.bytes)

    def arrays(self) -> Iterator[tuple[tuple[int, ...], int, str]]:
        """Shape, bytes and line of each result outside fusions, once."""
        fused = {
            m[1]
            for lines in self._bodies.values()
            for line in lines
            if " fusion(" in line
            for m in [_CALLED.search(line)]
            if m
        }
        for name, lines in self._bodies.items():
            if name not in fused:
                for line in lines:
                    if operation := _OPERATION.match(line):
                        for kind, dims in _ARRAY.findall(operation[1]):
                            shape = _ints(dims)
                            yield shape, _size(kind, shape), line

    def _walk(self, name: str, times: int) -> Iterator[tuple[str, int, str]]:
        """All lines that run, with their computation and how often."""
        for line in self._bodies.get(name, ()):
            yield name, times, line
            if not (" reduce(" in line or " sort(" in line or " scatter(" in line):
                for called in _called(line):
                    yield from self._walk(called, times * self._trips(line))

    def _trips(self, line: str) -> int:
        """How often a loop's body runs: what its condition compares the counter with. One for all else."""
        if " while(" not in line:
            return 1
        if known := _TRIPS.search(line):
            return int(known[1])
        condition = _CONDITION.search(line)
        lines = [text for _, _, text in self._walk(condition[1], 1)] if condition else []
        limits = [int(match[1]) for text in lines if (match := _CONSTANT.search(text))]
        return max(limits, default=1)


def _called(line: str) -> list[str]:
    """The computations that a line runs."""
    names = []
    for one, many in _CALLED.findall(line):
        names += [one] if one else [name.strip().lstrip("%") for name in many.split(",")]
    return names


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _size(kind: str, shape: tuple[int, ...]) -> int:
    return BYTES.get(kind, 4) * int(np.prod(shape, dtype=np.int64))


def _result(types: str) -> str:
    """Of the types of an asynchronous start, which has first its operands, then its results, those of the results."""
    depth, parts = 0, [""]
    for letter in types[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts[1] if types.startswith("(") else types


def _total(types: str) -> int:
    """Bytes of all arrays: several may travel together."""
    return sum(_size(kind, _ints(dims)) for kind, dims in _ARRAY.findall(types))


def _sent(kind: str, size: int, parts: int) -> int:
    """Bytes that each of `parts` devices sends, for a result of `size` bytes."""
    if parts < 2:
        return 0
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (parts - 1)
    return size * (parts - 1) // parts * (2 if kind == "all-reduce" else 1)


def _sent_across(kind: str, size: int, nodes: np.ndarray) -> int:
    """Bytes that a device sends to other nodes; `nodes` has that of each device of its group."""
    counts = np.unique(nodes, return_counts=True)[1]
    several, each = len(counts), int(counts.max())
    if kind in ("all-to-all", "collective-permute"):
        return _sent(kind, size, several)
    return _sent(kind, size * each if kind == "reduce-scatter" else size, several) // each


def _axes(line: str, mesh: Mapping[str, int], node: int) -> tuple[str, np.ndarray]:
    """The mesh axes that a collective's groups run along, and the devices of a group, by their place in the mesh."""
    group = _group(line, mesh, node)
    if group is None:
        return "?", np.arange(math.prod(mesh.values()))
    place = np.stack(np.unravel_index(group, tuple(mesh.values())))
    names = [name for name, row in zip(mesh, place, strict=True) if len(set(row.tolist())) > 1]
    whole = int(np.prod([mesh[name] for name in names]))
    pairs = "source_target_pairs" in line
    return (" x ".join(names) or "none") if pairs or whole == len(group) else "?", group


def _group(line: str, mesh: Mapping[str, int], node: int) -> np.ndarray | None:
    """The devices of one group, or a pair of sender and receiver, between nodes if any is; None if not understood."""
    if match := _IOTA.search(line):
        return _iota(match[2], match[3]).reshape(_ints(match[1]))[0]
    if match := _LISTED.search(line):
        return np.array(_ints(match[1]))
    if match := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        along = re.findall(r"'(\w+)'", match[5])
        if not set(along) <= set(sizes) or ":" in match[5]:
            return None
        order = np.array(_ints(match[4])) if match[4] else _iota(match[2] or str(math.prod(sizes.values())), match[3])
        return order.reshape(tuple(sizes.values()))[
            tuple(slice(None) if name in along else 0 for name in sizes)
        ].ravel()
    if match := _PAIRS.search(line):
        pairs = [_ints(pair) for pair in re.findall(r"\{([\d,]+)\}", match[1])]
        return np.array(max(pairs, key=lambda pair: (pair[0] // node != pair[1] // node, pair[0] != pair[1])))
    return np.arange(np.prod(list(mesh.values()))) if "replica_groups={}" in line else None


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    """Numbers from 0 on in an array of these sizes, its axes then permuted."""
    numbers = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return numbers.transpose(_ints(permutation)) if permutation else numbers
