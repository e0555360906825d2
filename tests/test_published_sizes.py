"""Every published size has exactly the parameters of the official code, and as many as its authors say."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import published
import pytest

from ar_jax.config import get_config
from ar_jax.system import from_config
from ar_jax.training.program import make_program

ROOT = Path(__file__).parents[1]
UNITS = {"M": 1e6, "B": 1e9}


def size(shapes) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def says(stated: str, exact: int) -> bool:
    """Whether a number such as "1.4B" is this one rounded to the nearest, up, or down: the authors do all three."""
    digits, unit = stated[:-1], UNITS[stated[-1]]
    last_digit = unit * 10.0 ** -len(digits.partition(".")[2])
    return abs(float(digits) * unit - exact) < last_digit


def _by_file() -> dict[str, list[str]]:
    """The names of the sizes of each system, as they are listed: the first and the last stand for those between."""
    found: dict[str, list[str]] = {}
    for name in published.NAMES:
        found.setdefault(name.split(":")[0], []).append(name)
    return found


ENDS = {row for rows in _by_file().values() for row in (rows[0], rows[-1])}


@pytest.mark.parametrize(
    ("name", "official", "more", "stated"),
    [row if row[0] in ENDS else pytest.param(*row, marks=pytest.mark.slow) for row in published.SIZES],
    ids=published.NAMES,
)
def test_a_published_size_has_the_official_parameters_and_an_optimizer(name, official, more, stated):
    file, variant = name.split(":")
    config = get_config(ROOT / f"configs/{file}.py:{variant}")
    program = make_program(from_config(config, published.facts_of(config)), config)  # nothing is allocated
    assert size(program.shapes.params["generator"]) == official + more
    assert published.TOKENIZERS.get(file) in (None, size(program.shapes.params["tokenizer"]))
    assert not stated or says(stated, official)


@pytest.mark.parametrize("file", sorted({name.split(":")[0] for name in published.NAMES}))
def test_every_published_variant_is_counted_and_the_base_is_one_of_them(file, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    counted = {name.split(":")[1] for name in published.NAMES if name.startswith(f"{file}:")}
    others = {
        v for v in importlib.import_module(f"configs.{file}").VARIANTS if not v.startswith("causal_")
    }  # MAR's baseline
    assert others == counted | {"base", "fashion", "smoke"}
    base = get_config(ROOT / f"configs/{file}.py")
    assert any(base == get_config(ROOT / f"configs/{file}.py:{variant}") for variant in counted)
