"""What evaluation reports of an agent: returns, lengths and successes of episodes that were held out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.agent_system import AgentRun
from ar_jax.data.protocol import Dataset
from ar_jax.evaluation.batches import held_out_batches
from ar_jax.evaluation.report import check_draws_none, check_eval, eval_folder
from ar_jax.training.workdir import write_atomically

NAMES = {"return": "mean_return", "length": "mean_length", "success": "success_rate"}


def held_out(run: AgentRun, data: Dataset) -> dict[str, float]:
    """`mean_return`, `mean_length` and `success_rate` of the held-out episodes.

    Actions are drawn from the policy; `greedy_mean_return` and so on are those of the likeliest actions.
    """
    metrics: dict[str, float] = {}
    for prefix, greedy in (("", False), ("greedy_", True)):
        played: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
        for number, batch in enumerate(held_out_batches(data, check_eval(run.config), run.params)):
            for name, values in run.play(batch["seed"], greedy, seed=number).items():
                played[name].append(values[batch["weight"] > 0])
        metrics |= {prefix + NAMES[name]: float(np.concatenate(parts).mean()) for name, parts in played.items()}
    return metrics


def evaluate(run: AgentRun, data: Dataset, workdir: str | Path) -> dict[str, Any]:
    """Metrics of the held-out episodes, written to `workdir`/eval.

    Returns:
      What `held_out` does, and `steps_per_second`, of all agents together once all is compiled.
    """
    check_draws_none(run.config, "An agent")
    folder = eval_folder(workdir)
    metrics: dict[str, Any] = {"step": run.step} | held_out(run, data)
    seeds = data.test.take(np.arange(min(check_eval(run.config), len(data.test))))["seed"]
    start = time.perf_counter()
    run.play(seeds)
    seconds = time.perf_counter() - start
    metrics["steps_per_second"] = len(seeds) * run.system.environment.max_steps / seconds
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics
