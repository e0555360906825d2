"""What evaluation reports of a tokenizer: how near reconstructions are, how codes are used, and pictures of both."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ar_jax.data.protocol import Dataset
from ar_jax.evaluation import pictures
from ar_jax.evaluation.batches import held_out_batches, whole
from ar_jax.evaluation.report import check_draws_none, check_eval, eval_folder
from ar_jax.tokenizer_system import TokenizerRun
from ar_jax.training.workdir import write_atomically

PER_ROW, ROWS = 10, 3


def held_out(run: TokenizerRun, data: Dataset) -> dict[str, float]:
    """Metrics of the held-out images.

    Returns:
      `PSNR_db`: the mean over images of 10 log10(4 / mean squared error), as values lie in [-1, 1];
      `mean_absolute_error` of those values; and for discrete tokens, of all codes of all images, `codebook_usage`, the
      fraction that occurs, and `perplexity` of their shares.
    """
    vocab_size = run.system.tokenizer.vocab_size
    psnr, error, count, uses = 0.0, 0.0, 0.0, np.zeros(vocab_size)
    for batch in held_out_batches(data, check_eval(run.config), run.params):
        tokens = run.encode(batch["image"])
        difference = (run.decode(tokens) - whole(batch["image"])).reshape(len(tokens), -1).astype(np.float64)
        weight = np.asarray(batch["weight"], np.float64)
        psnr += (psnr_db(np.square(difference).mean(axis=1)) * weight).sum()
        error += (np.abs(difference).mean(axis=1) * weight).sum()
        count += weight.sum()
        if vocab_size:
            uses += np.bincount(tokens[weight > 0].reshape(-1), minlength=vocab_size)
    metrics = {"PSNR_db": float(psnr / count), "mean_absolute_error": float(error / count)}
    return metrics | (code_metrics(uses) if vocab_size else {})


def psnr_db(mean_squared_error: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in decibels of values in [-1, 1]; at most 100, for a perfect reconstruction."""
    return 10 * np.log10(4 / np.maximum(mean_squared_error, 4e-10))


def code_metrics(uses: np.ndarray) -> dict[str, float]:
    """The fraction of codes in use, and the perplexity of their shares, from how often each occurs, [V]."""
    shares = uses[uses > 0] / uses.sum()
    return {"codebook_usage": float((uses > 0).mean()), "perplexity": float(np.exp(-(shares * np.log(shares)).sum()))}


def reconstruction_grid(run: TokenizerRun, data: Dataset) -> np.ndarray:
    """Held-out images, each above its reconstruction, uint8 [H, W, 3]."""
    count = min(PER_ROW * ROWS, len(data.test))
    images = data.test.take(np.arange(count))["image"]
    made, rows = run.reconstruct(images), []
    for start in range(0, count, PER_ROW):
        here = slice(start, start + PER_ROW)
        rows += [("original", images[here]), ("reconstruction", made[here])]
    return pictures.grid(rows, f"step {run.step}")


def evaluate(run: TokenizerRun, data: Dataset, workdir: str | Path) -> dict[str, float]:
    """Metrics of the held-out images, written with pictures to `workdir`/eval.

    Returns:
      What `held_out` does, and the speed of encoding and decoding once all is compiled.
    """
    check_draws_none(run.config, "A tokenizer")
    folder = eval_folder(workdir)
    metrics = {"step": run.step} | held_out(run, data)
    images = data.test.take(np.arange(min(check_eval(run.config), len(data.test))))["image"]
    start = time.perf_counter()
    run.reconstruct(images)
    metrics["reconstructions_per_second"] = len(images) / (time.perf_counter() - start)
    Image.fromarray(reconstruction_grid(run, data)).save(folder / "reconstructions.png")
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics
