"""What evaluation reports of a run: held-out metrics, speeds, and pictures of samples."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ar_jax.config import UsageError, check_keys
from ar_jax.data.protocol import Dataset
from ar_jax.evaluation import pictures
from ar_jax.evaluation.batches import held_out_batches
from ar_jax.evaluation.checks import checks
from ar_jax.evaluation.likelihood import likelihood, mean_loss, token_errors
from ar_jax.evaluation.samples import Prepared, measure, prepare, sample_options
from ar_jax.generator_run import Run
from ar_jax.system import compiled
from ar_jax.training.workdir import write_atomically

MAX_CLASSES = 10  # a picture shows the first so many
PER_CLASS = 8


def check_eval(config: Any) -> int:
    """`config.eval.batch_size`, 180 where it is left out.

    Raises:
      UsageError: an unknown key of `config.eval`, or a value that is not a whole number in its range.
    """
    section = dict(config.get("eval") or {})
    check_keys(section, ("batch_size", "every_steps", "samples", "data", "checkpoint"), "eval")
    sample_options(config)
    for name, least in (("batch_size", 1), ("every_steps", 0)):
        value = section.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"config.eval.{name}={value!r} must be a whole number of at least {least}.")
    checkpoint = section.get("checkpoint", "newest")
    if checkpoint not in ("newest", "best") and not str(checkpoint).isdigit():
        raise UsageError(f"config.eval.checkpoint={checkpoint!r} must be 'newest', 'best', or the number of a step.")
    return section.get("batch_size", 180)


def check_draws_none(config: Any, what: str) -> None:
    """Raises UsageError where `config.eval.samples` asks for samples of what has none."""
    if sample_options(config).num_samples:
        raise UsageError(f"{what} draws no samples; set config.eval.samples.num_samples=0.")


def eval_folder(workdir: str | Path) -> Path:
    """`workdir`/eval, made.

    Raises:
      UsageError: it cannot be.
    """
    folder = Path(workdir) / "eval"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot write to {folder} ({error.strerror or error}); make it writable.") from error
    return folder


def held_out(run: Run, data: Dataset) -> dict[str, float]:
    """Metrics of the held-out examples; see `likelihood`, and `mean_loss` for heads that have none."""
    batches = held_out_batches(data, check_eval(run.config), run.params)
    if not run.system.model.generator.head.has_likelihood:
        return mean_loss(run.system, run.params, batches, run.config["seed"])
    return likelihood(run.system, compiled(run.system.log_prob), run.params, batches, run.config["seed"])


def mistaken(run: Run, data: Dataset) -> dict[str, float]:
    """How often the model is wrong about the held-out examples' tokens; see `token_errors`."""
    batches = held_out_batches(data, check_eval(run.config), run.params)
    return token_errors(run.system, run.params, batches, run.config["seed"])


def labels_of(run: Run, per_class: int) -> np.ndarray | None:
    """`per_class` labels of each class that a picture shows, or None where samples have no class."""
    if not hasattr(run.system.model.generator.condition, "num_classes"):
        return None
    return np.repeat(np.arange(min(run.system.facts.num_classes, MAX_CLASSES)), per_class)


def draw_samples(run: Run) -> tuple[list[tuple[str, np.ndarray]], np.ndarray]:
    """Samples in labelled rows of PER_CLASS, and the tokens of all."""
    labels = labels_of(run, PER_CLASS)
    tokens = run.sample_tokens(labels, None if labels is not None else 8 * PER_CLASS, seed=run.config["seed"])
    data = run.decode(tokens)
    shown = [""] * 8 if labels is None else [run.system.facts.label_names[i] for i in labels[::PER_CLASS]]
    return list(zip(shown, data.reshape(len(shown), PER_CLASS, *data.shape[1:]), strict=True)), tokens


def sample_grid(run: Run) -> np.ndarray | None:
    """A labelled picture of samples, uint8 [H, W, 3]; None for text."""
    return None if run.system.facts.modality == "text" else pictures.grid(draw_samples(run)[0], f"step {run.step}")


def growing(run: Run, tokens: np.ndarray, index: int, frames: int = 12) -> list[tuple[int, np.ndarray]]:
    """One of the samples of `draw_samples` as it grew in its order, blank where nothing was known yet.

    Args:
      run: what was sampled from.
      tokens: [B, L] or [B, L, C], all samples.
      index: of the one to show.
      frames: at most so many steps are shown, evenly chosen, the last among them.

    Returns:
      Pairs of the number of steps done and the data after them, [H, W, C] or [length].
    """
    order, order_key = run.system.sampler.order, jax.random.split(jax.random.key(run.config["seed"]))[0]
    slots = np.asarray(order.slots(order_key, len(tokens)))[index]
    ends = np.cumsum(order.sizes)
    steps = np.unique(np.linspace(1, len(ends), min(frames, len(ends))).round().astype(int))
    known = np.zeros((len(steps), order.length), bool)
    for row, step in enumerate(steps):
        known[row, slots[: ends[step - 1]]] = True
    again = np.repeat(tokens[index : index + 1], len(steps), axis=0)
    data = run.system.tokenizer.preview(run.params["tokenizer"], jnp.asarray(again), jnp.asarray(known))
    return [(int(step), np.asarray(piece)) for step, piece in zip(steps, data, strict=True)]


def growth_strip(run: Run) -> np.ndarray:
    """Four samples as they grow, uint8 [H, W, 3]."""
    rows, tokens = draw_samples(run)
    strips = [(label, growing(run, tokens, PER_CLASS * row)) for row, (label, _) in enumerate(rows[:4])]
    steps = ", ".join(str(step) for step, _ in strips[0][1])
    return pictures.grid([(label, np.stack([x for _, x in strip])) for label, strip in strips], f"after step {steps}")


def judge_samples(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Metrics of samples, see `samples.measure`; pictures, and the samples where they are asked for, go to the folder."""
    result = measure(prepared)
    if result.neighbors is not None:
        Image.fromarray(result.neighbors.picture()).save(folder / "nearest.png")
    if result.images is not None:
        images = result.images
        arrays: dict[str, Any] = {"arr_0": images.repeat(3, axis=-1) if images.shape[-1] == 1 else images}
        if prepared.labels is not None:
            arrays["arr_1"] = prepared.labels.astype(np.int64)
        np.savez(folder / "samples.npz", **arrays)
    return result.metrics


def evaluate(
    run: Run, data: Dataset, workdir: str | Path, elsewhere: tuple[Run, Dataset] | None = None
) -> dict[str, Any]:
    """Metrics of the held-out data and of sampling, written with pictures to `workdir`/eval.

    Args:
      run: what is evaluated.
      data: its data set.
      workdir: its directory.
      elsewhere: the same parameters on other data, which `config.eval.data` names.

    Returns:
      The metrics, units in their names; speeds are those of a second call, when all is compiled. With
      `config.eval.samples.num_samples` there is `samples`, too: how good so many samples are, and by which protocol; with
      `config.eval.data` there is `other_data`: the metrics of those held-out data.
    """
    prepared = prepare(run, data)
    folder = eval_folder(workdir)
    metrics: dict[str, Any] = {"step": run.step} | held_out(run, data) | mistaken(run, data)
    metrics |= checks(run, data, check_eval(run.config))
    if elsewhere is not None:
        metrics["other_data"] = held_out(*elsewhere) | checks(*elsewhere, check_eval(run.config))
    rows, tokens = draw_samples(run)
    start = time.perf_counter()
    draw_samples(run)
    seconds = time.perf_counter() - start
    metrics["tokens_per_second"] = tokens.shape[0] * tokens.shape[1] / seconds
    metrics["seconds_per_sample"] = seconds / len(tokens)
    metrics["network_evaluations_per_sample"] = len(run.system.sampler.feed.chunks)
    if run.system.facts.modality != "text":
        Image.fromarray(pictures.grid(rows, f"step {run.step}")).save(folder / "samples.png")
        Image.fromarray(growth_strip(run)).save(folder / "growth.png")
    else:
        texts = [bytes(row.tolist()).decode("utf-8", "replace") for _, group in rows for row in group]
        (folder / "samples.txt").write_text("\n\n".join(texts))
    if prepared is not None:
        metrics["samples"] = judge_samples(prepared, folder)
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics
