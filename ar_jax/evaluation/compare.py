"""Sets results side by side: python -m ar_jax.evaluation.compare RUN RUN ...

A RUN is the directory of a run that eval.py has evaluated with config.eval.samples, or such a metrics.json. Results of different
protocols are refused, and the fields that differ are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ar_jax import command
from ar_jax.config import UsageError
from ar_jax.evaluation.samples import fingerprint

REMEDY = "evaluate it with python eval.py --workdir=RUN --config.eval.samples.num_samples=1000 and the like"


def read_result(path: str | Path) -> dict[str, Any]:
    """What eval.py has written of the samples of a run.

    Raises:
      UsageError: there is nothing, or its protocol and fingerprint do not belong together.
    """
    file = Path(path) / "eval" / "metrics.json" if Path(path).is_dir() else Path(path)
    try:
        samples: dict[str, Any] = json.loads(file.read_text())["samples"]
        told, found = samples["protocol"], samples["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} has no metrics of samples; {REMEDY}.") from error
    if fingerprint(told) != found:
        raise UsageError(f"{file} has a protocol that is not its fingerprint's, so it was changed; {REMEDY}.")
    return samples


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields of two protocols that differ, and their values in each."""
    return {k: (a.get(k), b.get(k)) for k in sorted(set(a) | set(b)) if a.get(k) != b.get(k)}


def compare(paths: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics of results of one protocol, by path.

    Raises:
      UsageError: fewer than two, one that is missing, or two protocols; the sentence names the fields that differ.
    """
    if len(paths) < 2:
        raise UsageError("compare needs two results or more; name the directories of evaluated runs.")
    results = {path: read_result(path) for path in paths}
    (first, one), *others = results.items()
    for path, other in others:
        if fields := differing(one["protocol"], other["protocol"]):
            told = ", ".join(f"{name} ({a} and {b})" for name, (a, b) in fields.items())
            raise UsageError(
                f"{first} and {path} do not compare, as their protocols differ in {told}; evaluate both alike."
            )
    return {path: {k: v for k, v in r.items() if isinstance(v, int | float)} for path, r in results.items()}


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each metric, a column for each result, in Markdown."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    lines = [f"| metric | {' | '.join(results)} |", f"| --- |{' ---: |' * len(results)}"]
    for name in names:
        values = (_shown(metrics[name]) if name in metrics else "" for metrics in results.values())
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def main(arguments: Sequence[str]) -> None:
    """The command."""
    paths = arguments[1:]
    if flag := next((path for path in paths if path.startswith("-")), None):
        raise UsageError(f"{flag!r} is not an option; name the directories of evaluated runs.")
    results = compare(paths)
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    command.call(main)
