"""What evaluation reports of a classifier: how often it is right, how sure it is, and what it takes for what."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ar_jax.classifier_system import ClassifierRun
from ar_jax.data.protocol import Dataset
from ar_jax.evaluation.batches import held_out_batches, whole
from ar_jax.evaluation.report import check_draws_none, check_eval, eval_folder
from ar_jax.training.workdir import write_atomically


def confusion(run: ClassifierRun, data: Dataset) -> tuple[np.ndarray, float]:
    """How many held-out examples of each class are taken for each, int [classes, classes], and the sum of -log p, in nats."""
    count, nats = np.zeros((run.system.facts.num_classes,) * 2, np.int64), 0.0
    for batch in held_out_batches(data, check_eval(run.config), run.params):
        label = whole(batch["label"])
        logits, real = run.logits(batch[run.system.data_key]).astype(np.float64), batch["weight"] > 0
        log_prob = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        nats -= log_prob[np.arange(len(logits)), label][real].sum()
        np.add.at(count, (label[real], logits.argmax(axis=-1)[real]), 1)
    return count, float(nats)


def metrics_of(count: np.ndarray, nats: float) -> dict[str, float]:
    """`accuracy`, and `cross_entropy_nats`, the mean of -log p of the right class."""
    return {"accuracy": float(np.trace(count) / count.sum()), "cross_entropy_nats": nats / float(count.sum())}


def held_out(run: ClassifierRun, data: Dataset) -> dict[str, float]:
    """Metrics of the held-out examples; see `metrics_of`."""
    return metrics_of(*confusion(run, data))


def evaluate(run: ClassifierRun, data: Dataset, workdir: str | Path) -> dict[str, Any]:
    """Metrics of the held-out examples, written with a table of confusions to `workdir`/eval.

    Returns:
      What `held_out` does; `accuracy_of_class` by its name; and the speed once all is compiled.
    """
    check_draws_none(run.config, "A classifier")
    folder = eval_folder(workdir)
    count, nats = confusion(run, data)
    names = run.system.facts.label_names
    right = np.diag(count) / np.maximum(count.sum(axis=1), 1)
    metrics: dict[str, Any] = {"step": run.step} | metrics_of(count, nats)
    metrics["accuracy_of_class"] = {name: float(part) for name, part in zip(names, right, strict=True)}
    examples = data.test.take(np.arange(min(check_eval(run.config), len(data.test))))[run.system.data_key]
    run.logits(examples)
    start = time.perf_counter()
    run.logits(examples)
    metrics["examples_per_second"] = len(examples) / (time.perf_counter() - start)
    draw(count, names, folder / "confusion.png")
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def draw(count: np.ndarray, names: tuple[str, ...], file: Path) -> None:
    """A picture of the shares of each class that are taken for each."""
    side = 2 + 0.35 * min(len(names), 40)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(count / np.maximum(count.sum(axis=1, keepdims=True), 1), vmin=0, vmax=1, cmap="Blues")
    axis.set(xlabel="taken for", ylabel="class")
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        for (row, column), n in np.ndenumerate(count):
            if n:
                axis.text(column, row, str(n), ha="center", va="center", fontsize=7)
    figure.savefig(file, dpi=80)
