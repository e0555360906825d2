"""Whether the values and parts of a config fit one another; each refusal is one sentence, before anything is compiled."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ar_jax.config import UsageError, check_keys
from ar_jax.feeds.protocol import Feed
from ar_jax.heads.protocol import Head
from ar_jax.mixers import MIXERS
from ar_jax.models.cascade import Cascade
from ar_jax.models.generator import Generator
from ar_jax.objectives.next_token import NextToken
from ar_jax.objectives.protocol import Objective
from ar_jax.orders.protocol import Order
from ar_jax.tokenizers.protocol import Tokenizer

SECTIONS = {
    "seed", "data", "tokenizer", "order", "feed", "condition", "model", "refiner", "posterior", "head", "objective",
    "optimizer", "schedule", "train", "checkpoint", "eval", "sampling", "mesh",
}  # fmt: skip
RANGES = {
    "temperature": (0, math.inf),
    "confidence_temperature": (0, math.inf),
    "top_k": (1, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "guidance_scale": (0, math.inf),
    "guidance_power": (0, math.inf),
    "guidance_steps": (0, math.inf),
    "guidance_dropout_rate": (0, 1),
    "label_smoothing": (0, 1),
    "z_loss": (0, math.inf),
}
WHOLE = ("top_k", "guidance_steps")


def is_masked(objective: Objective) -> bool:
    """Whether an objective trains networks that are fed all that is known in every step."""
    return bool(getattr(objective, "masked", False))


def check_sections(config: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Raises UsageError on an unknown section, one that is missing or no mapping, or a seed that is no whole number."""
    check_keys(config, SECTIONS, "")
    for name in needed:
        if name not in config:
            raise UsageError(f"config.{name} is missing; set it, as configs/digits.py does.")
    for name, section in config.items():
        if name != "seed" and not isinstance(section, Mapping | ConfigDict):
            raise UsageError(f"config.{name}={section!r} must be a section; write config.{name}.key=value.")
    seed = config.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UsageError(f"config.seed={seed!r} must be a whole number from 0 to {2**32 - 1}.")


def check_cascade(generator: Generator | Cascade, objective: Objective) -> None:
    """Two networks that draw in turn have one output each, and are trained on whole sequences."""
    if not isinstance(generator, Cascade):
        return
    for network in (generator.first, generator.second):
        alone = getattr(network.decoder, "num_outputs", 1) == 1 and getattr(
            network.decoder, "keeps_segments_apart", False
        )
        if not alone or network.embedding.merge == "shuffle" or getattr(network.head, "tied", False):
            raise UsageError(
                "config.model and config.refiner of feed 'refine' must be of kind 'decoder' with one output a token and a head "
                "that is not tied; leave out branch_layers, reads_answers, merge='shuffle' and config.head.tied."
            )
    names = {kind: name for name, kind in MIXERS.items()}
    deaf = [names[type(mixer)] for make in generator.second.decoder.mixers if not (mixer := make()).reads_peers]
    if deaf:
        raise UsageError(
            f"mixer {deaf[0]!r} reads earlier tokens only, but config.refiner is fed all at once; use mixer 'softmax' there."
        )
    if not isinstance(objective, NextToken) or objective.num_answers:
        raise UsageError(
            "feed 'refine' is trained on whole sequences; set config.objective.kind='next_token' and leave out num_answers."
        )


def check_objective(objective: Objective, tokenizer: Tokenizer) -> None:
    """What is smoothed is a vocabulary."""
    options = {name: getattr(objective, name) for name in ("label_smoothing", "z_loss") if hasattr(objective, name)}
    check_range(options)
    if not tokenizer.vocab_size and any(options.values()):
        raise UsageError(
            "config.objective.label_smoothing and z_loss are for a vocabulary; set both to 0 for continuous tokens."
        )


def check_fit(feed: Feed, objective: Objective, generator: Generator | Cascade) -> None:
    """The objective must train this feed, and mixers and backbone serve what it feeds."""
    if feed.has_parallel == is_masked(objective):
        wanted = "feed 'mask' only" if is_masked(objective) else "no feed 'mask'"
        raise UsageError(
            f"This objective trains {wanted}; set config.feed.kind='auto', or another config.objective.kind."
        )
    mixers = [make() for make in generator.decoder.mixers]
    names = {kind: name for name, kind in MIXERS.items()}
    deaf = [names[type(mixer)] for mixer in mixers if not mixer.reads_peers]
    if not feed.has_parallel and deaf:
        raise UsageError(
            f"mixer {deaf[0]!r} reads earlier tokens only, but feed 'mask' needs all; use mixer 'softmax'."
        )
    seers = [names[type(mixer)] for mixer in mixers if not mixer.causal]
    if feed.has_parallel and seers:
        raise UsageError(
            f"mixer {seers[0]!r} reads later tokens, too, so it serves feed 'mask' only; use another mixer."
        )
    near = feed.chunks[0].near is not None
    blind = [names[type(mixer)] for mixer in mixers if not hasattr(mixer, "reads_near")]
    if near and (blind or not getattr(generator.decoder, "keeps_segments_apart", False)):
        raise UsageError(
            f"feed 'nearby' tells who is near, which {f'mixer {blind[0]!r}' if blind else 'this backbone'} does not heed; "
            "set config.model.kind='decoder' and mixer.kind='softmax'."
        )
    if feed.apart and not getattr(generator.decoder, "keeps_segments_apart", False):
        raise UsageError(
            "feed 'recent' packs its steps behind one another, which this backbone does not keep apart; "
            "set config.model.kind='decoder'."
        )


def check_posterior(feed: Feed, objective: Objective, posterior: Generator) -> None:
    """A posterior is asked by an objective that has one, of networks that its feed fits."""
    if not hasattr(objective, "posterior"):
        raise UsageError(
            "config.posterior is the network that draws the orders of config.objective.kind='learned_order'; leave it out."
        )
    check_fit(feed, objective, posterior)


def check_joint(head: Head, objective: Objective, order: Order) -> None:
    """A head that draws tokens together must be asked for all of them at once."""
    if not getattr(head, "draws_jointly", False):
        return
    if order.num_steps > 1:
        raise UsageError(
            f"The head draws all tokens together, but the order has {order.num_steps} steps; set config.order.kind='blocks' "
            "with config.order.block, the sides of the whole grid."
        )
    if is_masked(objective) or getattr(objective, "num_answers", False):
        raise UsageError(
            "The head is trained on whole sequences; set config.objective.kind='next_token' and leave out num_answers."
        )


def check_outputs(feed: Feed, generator: Generator | Cascade) -> None:
    """Each token must have as many outputs as the feed asks for."""
    outputs, inner = generator.num_outputs, getattr(generator.decoder, "num_outputs", 1)
    if generator.embedding.merge == "shuffle" and (inner > 1 or feed.chunks[0].members is None):
        raise UsageError(
            "config.model.merge='shuffle' needs config.feed.kind='merge' and a model of one output; set them, or merge='mean'."
        )
    if feed.num_outputs != outputs:
        raise UsageError(
            f"The feed takes answers from {feed.num_outputs} outputs of each token, but the model gives {outputs}; set "
            f"config.model.kind='decoder' with branch_layers={(1,) * (feed.num_outputs - 1)}, or another config.feed.kind."
        )
    told, reads = feed.chunks[0].between is not None, getattr(generator.decoder, "num_stages", 1) > 1
    if told != reads and outputs > 1:
        raise UsageError(
            "A model whose layers read what the layers before have drawn needs codes of one place that are fed together; set "
            "config.model.reads_answers=True and config.feed.kind='merge' with one token a step, or neither."
        )
    own = getattr(generator.head, "num_outputs", 1)
    if own not in (1, outputs):
        raise UsageError(f"config.head.num_outputs={own} must be the model's {outputs}, or 1.")


def check_range(settings: Mapping[str, Any]) -> None:
    """Raises UsageError on the first value that is no number in its range; None is a filter left out."""
    for name, value in settings.items():
        low, high = RANGES[name]
        if value is None:
            continue
        number = value.item() if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 else value
        whole = name not in WHOLE or isinstance(number, numbers.Integral)
        real = isinstance(number, numbers.Real) and not isinstance(number, bool)
        if not (real and whole and low <= number <= high and number != math.inf):
            limits = f"at least {low}" + (f" and at most {high}" if high < math.inf else "")
            raise UsageError(f"{name}={value!r} must be a {'whole ' if name in WHOLE else ''}number of {limits}.")
