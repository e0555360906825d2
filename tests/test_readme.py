"""What README.md and CONTRIBUTING.md show works as it is shown."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ar_jax
from ar_jax import heads, mixers, models, objectives, plan, tokenizers
from ar_jax.orders import ORDERS

ROOT = Path(__file__).parents[1]
BLANKS = {
    "tokenizers": tokenizers.TOKENIZERS,
    "orders": ORDERS,
    "mixers": mixers.MIXERS,
    "models": models.BACKBONES,
    "heads": heads.HEADS,
    "objectives": objectives.OBJECTIVES,
}


def blocks(file: str, language: str) -> list[str]:
    """The blocks of code in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / file).read_text(), re.M | re.S)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory that has the configs, and that runs may be written to."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


def test_the_snippets_of_the_readme_run(elsewhere):
    """In a process of its own, on one device, as a user has it."""
    checks = """
assert images.shape == (3, 8, 8, 1) and nats.shape == (3,)
np.testing.assert_array_equal(same_upper_half[:, :4], images[:, :4])
assert run.system.describe()["steps per example"].startswith("9 ")
"""
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    script = "\n".join([*blocks("README.md", "python"), checks])
    result = subprocess.run([sys.executable, "-c", script], env=os.environ | quick, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_worked_example_of_contributing_works(elsewhere, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    part, line, row, config = blocks("CONTRIBUTING.md", "python")
    names: dict[str, Any] = {"ORDERS": dict(ORDERS)}
    for block in (part, line, row, config):
        exec(block, names)
    order = names["ORDERS"]["snake"](((3, 3),))
    assert order.step.tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8] and names["ROW"]["snake"]["kind"] == "snake"
    monkeypatch.setitem(ORDERS, "snake", names["snake"])
    assert ar_jax.build_run(names["get_config"]("smoke")).system.model.order.num_steps == 64


@pytest.mark.parametrize("folder", BLANKS)
def test_the_readme_names_every_part(folder):
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if f"`ar_jax/{folder}/`" in line)
    listed = re.findall(r"`(\w+)`", row.split("|")[4])
    assert listed == list(BLANKS[folder])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([\w./]+)\)", (ROOT / page).read_text())
    assert links and all((ROOT / link).exists() for link in links) or page == "CONTRIBUTING.md" and not links


@pytest.mark.parametrize("command", [line for b in blocks("README.md", "sh") for line in b.splitlines()])
def test_the_commands_of_the_readme_are_understood(command, monkeypatch, tmp_path, capsys):
    words = command.partition("#")[0].split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[2] == "ar_jax.plan":  # without a pod: that of every parameter
        monkeypatch.chdir(ROOT)
        plan.main([word for word in words[2:] if not word.startswith("--topology")])
        assert "MiB on a device" in capsys.readouterr().out
        return
    if words[1] == "-m":
        command = importlib.import_module(words[2])
        monkeypatch.chdir(tmp_path)
        assert command.main(words[3:]) == 2  # all that it lacks are the files
        assert re.search("does not exist|No such file", capsys.readouterr().err)
        return
    from ar_jax.command import parse

    monkeypatch.chdir(ROOT)
    read = None if words[1] == "train.py" else lambda workdir: ar_jax.get_config("configs/digits.py")
    config, workdir = parse(words[1:], read)
    assert workdir.startswith("runs/")
    assert config.objective.kind == "classification" or config.order.kind in ORDERS
