"""The catalogue says only what is true: of the papers, of the files of this repository, and of its tests."""

import csv
import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
import rich.console

from ar_jax import systems
from ar_jax.config import UsageError

ROOT = pathlib.Path(__file__).parents[1]
LIST = ROOT.parent / "shared" / "systems.tsv"
ENTRY = 'name = "N"\ntitle = "T"\narea = "O"\nstatus = "planned"\nclaim = "C"\n'
CLAIMED = systems.System(
    id="S001",
    name="N",
    title="T",
    area="O",
    status="works",
    claim="C",
    config="configs/digits.py",
    parts=("config",),
    test="tests/test_systems.py::test_every_number_is_there_once",
)


def problems_with_files(system: systems.System) -> list[str]:
    """What the catalogue says of a system's config and parts although it is not so."""
    found = [
        f"{system.id}: no file ar_jax/{part}.py and no folder of that name"
        for part in system.parts
        if not (ROOT / "ar_jax" / f"{part}.py").is_file() and not (ROOT / "ar_jax" / part / "__init__.py").is_file()
    ]
    path = ROOT / system.config
    if not path.is_file():
        return [*found, f"{system.id}: no file {system.config}"]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.get_config()
        module.get_config("smoke")
    except Exception as error:  # whatever a broken config raises is a finding
        found.append(f"{system.id}: {system.config} does not give a default and a smoke config: {error!r}")
    return found


def uncollected(nodes: list[str]) -> list[str]:
    """Those of the nodes, such as `tests/test_x.py::test_y`, that pytest does not find."""
    if not nodes:
        return []
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, *nodes], cwd=ROOT, capture_output=True, text=True, timeout=300)
    if result.returncode and len(nodes) > 1:  # one missing node hides the others, so each is asked for by itself
        return [node for node in nodes if uncollected([node])]
    collected = result.stdout.splitlines()
    return [node for node in nodes if not any(re.match(rf"{re.escape(node)}($|\[)", line) for line in collected)]


def test_every_number_is_there_once():
    assert list(systems.load()) == [f"S{number:03}" for number in range(1, 208)]


@pytest.mark.skipif(not LIST.is_file(), reason="the list of systems, ../shared/systems.tsv, is not on this machine")
def test_names_and_areas_are_those_of_the_list():
    lines = [line for line in LIST.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    listed = {row["id"]: (row["name"], row["area"]) for row in rows}
    assert {id: (system.name, system.area) for id, system in systems.load().items()} == listed


def test_the_page_is_what_the_catalogue_prints():
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    assert page == systems.markdown(list(systems.load().values())), "docs/systems.md is out of date; run `make docs`"


def test_the_page_shows_every_system_and_counts_it_once():
    catalogue = systems.load()
    page = systems.markdown(list(catalogue.values()))
    assert re.findall(r"^\| (S\d{3}) \|", page, re.M) == sorted(
        catalogue, key=lambda id: list(systems.AREAS).index(catalogue[id].area)
    )
    assert sum(int(number) for number in re.findall(r"^(\d+) systems?:", page, re.M)) == 2 * len(catalogue)
    assert "a\\|b" in systems.markdown([dataclasses.replace(CLAIMED, claim="a|b")])


def test_what_is_said_to_run_has_its_config_and_parts():  # that the configs train is for test_configs.py
    claimed = [system for system in systems.load().values() if system.status != "planned"]
    assert [problem for system in claimed for problem in problems_with_files(system)] == []


def test_what_is_said_to_be_shown_is_shown_by_a_test_that_exists():
    assert uncollected(sorted({test for system in systems.load().values() for test in system.test.split()})) == []


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(), []),
        (dict(parts=("config", "orders/no_such")), ["no file ar_jax/orders/no_such.py"]),
        (dict(config="configs/no_such.py"), ["no file configs/no_such.py"]),
        (dict(config="ar_jax/config.py"), ["does not give a default and a smoke config"]),
    ],
    ids=str,
)
def test_a_false_claim_about_files_is_found(change, says, tmp_path):
    (tmp_path / "good.py").write_text("def get_config(variant='base'):\n    return {'base': 1, 'smoke': 2}[variant]\n")
    system = dataclasses.replace(CLAIMED, **dict(config=str(tmp_path / "good.py")) | change)
    problems = problems_with_files(system)
    assert len(problems) == len(says) and all(text in problem for text, problem in zip(says, problems, strict=True))


def test_a_false_claim_about_tests_is_found():
    false = ["tests/test_systems.py::test_no_such", "tests/no_such.py::test_x"]
    assert uncollected([CLAIMED.test, *false]) == false


@pytest.mark.parametrize(
    "text, says",
    [
        (f"[S001]\n{ENTRY}conifg = ''\n", "S001 .*unknown key 'conifg'.*Did you mean 'config'"),
        (f"[S001]\n{ENTRY}id = 'S002'\n", "S001 .*unknown key 'id'"),
        (f"[S001]\n{ENTRY}".replace('"O"', '"Q"'), "The area of S001 .*'Q' is unknown"),
        (f"[S001]\n{ENTRY}".replace("planned", "workz"), "The status of S001 .*Did you mean 'works'"),
        (f"[S001]\n{ENTRY}".replace("planned", "works"), "S001 .*'works' without config and parts and test"),
        (f"[S001]\n{ENTRY}parts = 'orders/raster'\n", "S001 .*parts = .*a list of texts"),
        (f"[S001]\n{ENTRY}parts = [1]\n", "S001 .*parts = .*a list of texts"),
        (f"[S001]\n{ENTRY}config = 3\n", "S001 .*config = 3 .*a text"),
        (f"[S001]\n{ENTRY}".replace('"C"', '""'), "S001 .*empty claim"),
        (f"[S001]\n{ENTRY}".replace("claim", "test"), "S001 .*has no claim"),
        (f"[S1]\n{ENTRY}", "S1 .*is not a system's number"),
        ("S001 = 3\n", "S001 .*is not a table"),
        (f"[S001]\n{ENTRY}[S001]\n{ENTRY}", "not valid TOML.*S001"),
    ],
)
def test_a_bad_entry_is_named(text, says):
    with pytest.raises(UsageError, match=f"(?s){says}"):
        systems.parse(text)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--area", "Q"], "--area 'Q' is unknown"),
        (["--area", "orders"], "Did you mean 'O'"),
        (["--area", "vidoe"], "Did you mean 'V'"),
        (["--status", "wroks"], "Did you mean 'works'"),
        (["--status"], "expected one argument"),
        (["--statsu", "works"], "Did you mean '--status'"),
        (["works"], "works is not an option"),
    ],
    ids=str,
)
def test_a_bad_option_is_one_sentence_and_exit_code_2(arguments, says, capsys):
    assert systems.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and says in printed.err and printed.err.count("\n") == 1


def test_the_command_prints_one_plain_line_a_system_where_there_is_no_terminal(capsys):
    assert systems.main(["--area", "h", "--status", "planned"]) == 0
    wanted = [s.id for s in systems.load().values() if (s.area, s.status) == ("H", "planned")]
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == wanted


def test_a_terminal_gets_a_table_with_names_as_they_are_written():
    console = rich.console.Console(force_terminal=True, width=120)
    with console.capture() as captured:
        systems.show([dataclasses.replace(CLAIMED, name="[bold]N")], console)
    assert "[bold]N" in captured.get() and "1 system: 1 working" in captured.get()
