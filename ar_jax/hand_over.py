"""A raster model begins, a masked one fills in the rest: python -m ar_jax.hand_over --first=RUN --second=RUN --num_steps=64.

MaskGIL (S033, arXiv:2507.13032) speeds autoregressive generation up so: FIRST, such as a run of configs/llamagen.py, draws as many
tokens as it does in --num_steps network evaluations, and SECOND, such as one of configs/maskgil.py on the same tokens, all others
in the steps of its own schedule. How many steps to leave to the first is the user's choice. Writes --out=hand_over.png with rows of
the first alone, of both, and of the second alone, and ends with a line of JSON: network evaluations and seconds of each.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from ar_jax import command
from ar_jax.config import UsageError
from ar_jax.evaluation import pictures
from ar_jax.run import Run, load
from ar_jax.training.workdir import plain_values

SHOWN = 16  # samples in a row of the picture


def hand_over(
    first: Run,
    second: Run,
    num_steps: int,
    labels: Sequence[int] | np.ndarray | None = None,
    num_samples: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draws tokens by two models of the same tokens: the first its first steps, the second what is left.

    Args:
      first: of an order that is the same for all examples, such as raster.
      second: of a random order and objective "masked". Its schedule, such as MaskGIL's 8 steps, is over what is left.
      num_steps: network evaluations of the first.
      labels: see `Run.sample_tokens`, for both.
      num_samples: B, where there are no labels.
      seed: of both.

    Returns:
      [B, L] int32 or [B, L, C] float32.

    Raises:
      UsageError: models of different tokens, a second one that cannot fill in, or as in `Run.sample_tokens`.
    """
    check_alike(first, second)
    known = first.slots_after(num_steps)
    begun = first.sample_tokens(labels, num_samples, seed, num_steps=num_steps)
    filler = told(second, int(known.sum()))
    return filler.sample_tokens(labels, num_samples, seed, given=begun, given_mask=known)


@functools.lru_cache(maxsize=8)
def told(run: Run, num_told: int) -> Run:
    """The run with a schedule for the tokens that are left where so many are given."""
    config = ConfigDict(plain_values(run.config))
    order = dict(dict(config.get("sampling") or {}).get("order") or config.order)
    if order["kind"] != "random":
        raise UsageError(
            f"The second model samples in order {order['kind']!r}, which cannot fill in what is left; give one that samples in "
            "order 'random', such as configs/maskgil.py."
        )
    config.sampling = dict(config.get("sampling") or {}) | {"order": order | {"num_told": num_told}}
    return run.rebuilt(config)


def num_evaluations(run: Run) -> int:
    """Network evaluations of an example."""
    return len(run.system.sampler.feed.chunks)


def check_alike(first: Run, second: Run) -> None:
    """Raises UsageError where two models do not draw the same tokens."""
    one, other = (run.system.tokenizer for run in (first, second))
    same = (one.layout, one.vocab_size, one.channels) == (other.layout, other.vocab_size, other.channels)
    leaves = [jax.tree.leaves(run.params["tokenizer"]) for run in (first, second)]
    same = same and len(leaves[0]) == len(leaves[1])
    if not (same and all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))):
        raise UsageError(
            f"The models draw different tokens, on {one.layout} and on {other.layout}; train both with the same tokenizer."
        )


def timed(draw: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """What a call draws, and the seconds of a second call."""
    draw()
    start = time.perf_counter()
    return draw(), time.perf_counter() - start


def main(arguments: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_string("first", None, "the run that begins", flag_values=values, required=True)
    flags.DEFINE_string("second", None, "the run that fills in", flag_values=values, required=True)
    flags.DEFINE_integer("num_steps", None, "network evaluations of the first", flag_values=values, required=True)
    flags.DEFINE_integer("num_samples", 10, "to draw", flag_values=values)
    flags.DEFINE_string("out", "hand_over.png", "the picture to write", flag_values=values)
    if left := values(list(arguments))[1:]:
        raise UsageError(f"{left[0]!r} is not a flag; write --first=RUN --second=RUN.")
    first, second = load(values.first), load(values.second)
    if not (isinstance(first, Run) and isinstance(second, Run)):
        raise UsageError("hand_over needs two generators, and one of these runs is none; name others.")
    if first.system.facts.modality != "image":
        raise UsageError("hand_over shows images; from Python, ar_jax.hand_over.hand_over draws other tokens, too.")
    count = first.system.facts.num_classes
    labels = np.arange(values.num_samples) % count if count else None
    drawn: dict[str, Any] = {
        "first": lambda: first.sample_tokens(labels, values.num_samples),
        "both": lambda: hand_over(first, second, values.num_steps, labels, values.num_samples),
        "second": lambda: second.sample_tokens(labels, values.num_samples),
    }
    alone = {"first": num_evaluations(first), "second": num_evaluations(second)}
    told_after = told(second, int(first.slots_after(values.num_steps).sum()))
    evaluations = alone | {"both": values.num_steps + num_evaluations(told_after)}
    found = {name: timed(draw) for name, draw in drawn.items()}
    rows = [(f"{name}, {evaluations[name]}", second.decode(tokens[:SHOWN])) for name, (tokens, _) in found.items()]
    out = Path(values.out)
    try:
        Image.fromarray(pictures.grid(rows, "network evaluations")).save(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"The picture cannot be written to {out} ({error}); choose another --out.") from error
    print(f"hand_over: {out} shows {min(values.num_samples, SHOWN)} samples of each")
    seconds = {name: time / values.num_samples for name, (_, time) in found.items()}
    print(json.dumps({"network_evaluations": evaluations, "seconds_per_sample": seconds}))


if __name__ == "__main__":
    command.call(main)
