"""The notebook runs from its first cell to its last."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


def test_the_notebook_runs_and_shows_pictures(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own parts, about each other
        from nbclient import NotebookClient

        monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a user has
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute(env=dict(os.environ))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    said = "".join(output.get("text", "") for output in outputs)
    assert "step 40/40" in said and "network evaluations per image: 8" in said and "bits per pixel: [" in said
