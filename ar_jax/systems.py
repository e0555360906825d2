"""The catalogue of systems: what each paper claims, and whether this library already shows it.

`python -m ar_jax.systems [--area O] [--status works]` prints it as a table, or as tab-separated lines where the output
is not a terminal; `--markdown` prints docs/systems.md. The data are in systems.toml, beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import pathlib
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table

from ar_jax.config import UsageError, nearest

AREAS = {
    "O": "Orders and discrete generators",
    "C": "Continuous-token generators",
    "T": "Tokenizers",
    "L": "Linear, recurrent, convolutional and Fourier mixers",
    "S": "Sparse, local and distributed attention",
    "H": "Hierarchical and long context",
    "J": "Objectives and post-training",
    "D": "Decoding, control, editing and safety",
    "V": "Video and world models",
    "M": "Other modalities: speech, audio, motion, 3-D, brain, text in images",
    "X": "Time series",
    "B": "Tabular and recommendation",
    "R": "Recognition backbones and dense prediction",
    "G": "Agents",
    "A": "Analysis, and theory made runnable",
}
STATUSES = {
    "planned": "nothing of it runs yet",
    "partial": "its config trains; part of the claim is not shown yet",
    "works": "the named tests show the claim",
}
COLUMNS = ("id", "area", "status", "name", "config", "works means")


@dataclasses.dataclass(frozen=True)
class System:
    """One paper as a system of this library: an entry of systems.toml, whose header tells what each field means."""

    id: str
    name: str
    title: str
    area: str
    status: str
    claim: str
    config: str = ""
    parts: tuple[str, ...] = ()
    test: str = ""
    arxiv: str = ""

    def __post_init__(self) -> None:
        """Checks the entry by itself; that its config, parts and test exist is for a test to check.

        Raises:
          UsageError: a field that is empty, unknown or of the wrong form; it names the entry.
        """
        where = f"{self.id} in systems.toml"
        if not re.fullmatch(r"S\d{3}", self.id):
            raise UsageError(f"{where} is not a system's number; write S and three digits, such as S001.")
        for field in ("name", "title", "area", "status", "claim"):
            if not getattr(self, field):
                raise UsageError(f"{where} has an empty {field}; every system needs one.")
        known(f"The area of {where}", self.area, AREAS)
        known(f"The status of {where}", self.status, STATUSES)
        missing = [field for field in ("config", "parts", "test") if not getattr(self, field)]
        if self.status != "planned" and missing:
            raise UsageError(f"{where} is {self.status!r} without {' and '.join(missing)}; fill in or say 'planned'.")


def known(what: str, value: str, table: Mapping[str, str]) -> str:
    """Returns `value` if it is a key of `table` (key -> meaning).

    Raises:
      UsageError: it is not; the message names all keys and the nearest, by its spelling or by a word of its meaning.
    """
    if value in table:
        return value
    keys = {word.strip(",:").lower(): key for key, meaning in table.items() for word in (*meaning.split(), key)}
    near = difflib.get_close_matches(value.lower(), [word for word in keys if len(word) > 3], n=1)
    hint = f" Did you mean {keys[near[0]]!r}?" if near else ""
    options = ", ".join(f"{key} ({meaning})" for key, meaning in table.items())
    raise UsageError(f"{what} {value!r} is unknown.{hint} Known: {options}.")


def parse(text: str) -> dict[str, System]:
    """Reads a catalogue.

    Args:
      text: TOML with one table a system, named by its id, with the fields of `System`.

    Returns:
      The systems by their id, in the order of the text.

    Raises:
      UsageError: text that is not TOML, or an entry with a missing or unknown key or value; it names the entry.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"systems.toml is not valid TOML: {error}.") from error
    return {id: _system(id, entry) for id, entry in tables.items()}


def _system(id: str, entry: Any) -> System:
    where = f"{id} in systems.toml"
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is not a table; start it with [{id}].")
    fields = {field.name: field for field in dataclasses.fields(System) if field.name != "id"}
    for key, value in entry.items():
        if key not in fields:
            raise UsageError(f"{where} has the unknown key {key!r}.{nearest(key, fields)} Known: {', '.join(fields)}.")
        wanted, texts = ("a list of texts", value) if key == "parts" else ("a text", [value])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{where}: {key} = {value!r} has the wrong type; give {wanted}.")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in entry]
    if missing:
        raise UsageError(f"{where} has no {missing[0]}; every system needs one.")
    return System(id=id, **entry | {"parts": tuple(entry.get("parts", ()))})


def load() -> dict[str, System]:
    """The library's own catalogue: every system by its id, in the order of their numbers."""
    return parse(pathlib.Path(__file__).with_name("systems.toml").read_text(encoding="utf-8"))


def select(systems: Mapping[str, System], area: str | None = None, status: str | None = None) -> list[System]:
    """The systems of an area and a status, where None means all.

    Raises:
      UsageError: an area or status that does not exist; it names the nearest one.
    """
    if area is not None:
        area = known("--area", area.upper() if len(area) == 1 else area, AREAS)
    if status is not None:
        status = known("--status", status, STATUSES)
    return [s for s in systems.values() if area in (None, s.area) and status in (None, s.status)]


def counts(systems: Sequence[System]) -> str:
    """How many systems there are, and how many of each status: `207 systems: 3 working, 1 partial, 203 planned`."""
    number = {status: sum(system.status == status for system in systems) for status in STATUSES}
    noun = "system" if len(systems) == 1 else "systems"
    return f"{len(systems)} {noun}: {number['works']} working, {number['partial']} partial, {number['planned']} planned"


def markdown(systems: Sequence[System]) -> str:
    """docs/systems.md: the systems grouped by area, with counts."""
    lines = [
        "# Systems",
        "",
        "<!-- Written by `make docs` from ar_jax/systems.toml: edit that file, not this one. -->",
        "",
        "Every system of the library, what has to be true before it may be called working, and where that is shown. "
        '"Parity" means agreement with the official implementation on recorded inputs and outputs.',
        "",
        *(f"- **{status}**: {meaning}" for status, meaning in STATUSES.items()),
        "",
        f"{counts(systems)}.",
    ]
    for area, name in AREAS.items():
        members = [system for system in systems if system.area == area]
        if members:
            lines += ["", f"## {name} ({area})", "", f"{counts(members)}.", ""]
            lines += ["| id | system | status | works means | shown by |", "| --- | --- | --- | --- | --- |"]
            lines += [_row(system) for system in members]
    return "\n".join(lines) + "\n"


def _row(system: System) -> str:
    """One line of a markdown table; a `|` inside a cell is escaped."""
    paper = f"[{system.title}](https://arxiv.org/abs/{system.arxiv})" if system.arxiv else system.title
    shown = [f"config [{system.config}](../{system.config})"] if system.config else []
    shown += [f"parts {', '.join(system.parts)}"] if system.parts else []
    shown += [f"test `{test}`" for test in system.test.split()]
    cells = (system.id, f"**{system.name}**: {paper}", system.status, system.claim, "<br>".join(shown))
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def show(systems: Sequence[System], console: rich.console.Console) -> None:
    """Prints a table on a terminal, and tab-separated lines with the same columns elsewhere."""
    rows = [(s.id, s.area, s.status, s.name, s.config, s.claim) for s in systems]
    if not console.is_terminal:
        console.file.write("".join("\t".join(row) + "\n" for row in rows))
        return
    table = rich.table.Table(*COLUMNS, box=rich.box.SIMPLE, title=counts(systems))
    for row in rows:
        table.add_row(*map(rich.markup.escape, row))
    console.print(table)


def _run(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        "python -m ar_jax.systems", description="Prints the catalogue.", exit_on_error=False
    )
    parser.add_argument("--area", help="; ".join(f"{letter}: {name}" for letter, name in AREAS.items()))
    parser.add_argument("--status", help="; ".join(f"{status}: {meaning}" for status, meaning in STATUSES.items()))
    parser.add_argument("--markdown", action="store_true", help="print docs/systems.md instead of a table")
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}.") from error
    if unknown:
        flags = ("--area", "--status", "--markdown", "--help")
        raise UsageError(f"{unknown[0]} is not an option.{nearest(unknown[0], flags)} Known: {', '.join(flags)}.")
    chosen = select(load(), options.area, options.status)
    if options.markdown:
        sys.stdout.write(markdown(chosen))
    else:
        show(chosen, rich.console.Console())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the catalogue and returns 0, or one sentence on standard error and returns 2."""
    try:
        _run(arguments)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
