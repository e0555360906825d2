"""A system: everything that a config names, built, with the functions that training, evaluation and notebooks call."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from ar_jax.config import UsageError, build, check_keys, choose
from ar_jax.data.protocol import Facts
from ar_jax.feeds import FEEDS
from ar_jax.heads import HEADS
from ar_jax.heads.protocol import Head, Sampling
from ar_jax.models import MODELS
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.conditioning import CONDITIONERS, Conditioner, NoCondition
from ar_jax.models.decoder import Decoder
from ar_jax.models.generator import Context
from ar_jax.objectives import OBJECTIVES
from ar_jax.objectives.masked import Masked
from ar_jax.objectives.protocol import Objective
from ar_jax.orders import ORDERS
from ar_jax.orders.protocol import Order
from ar_jax.sampling.guidance import SCHEDULES, guidance_scales
from ar_jax.sampling.likelihood import log_prob
from ar_jax.sampling.loop import Given, generate
from ar_jax.tokenizers import TOKENIZERS
from ar_jax.tokenizers.protocol import Tokenizer

Params = Any
SECTIONS = {
    "seed", "data", "tokenizer", "order", "feed", "condition", "model", "head", "objective",
    "optimizer", "schedule", "train", "checkpoint", "eval", "sampling", "mesh",
}  # fmt: skip
PARTS = ("tokenizer", "order", "model")
RANGES = {
    "temperature": (0, math.inf),
    "top_k": (1, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "guidance_scale": (0, math.inf),
    "guidance_dropout_rate": (0, 1),
    "label_smoothing": (0, 1),
    "z_loss": (0, math.inf),
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "guidance_scale", "guidance_schedule")


@functools.lru_cache(maxsize=32)
def compiled(method: Callable[..., Any]) -> Any:
    """`jax.jit` of a system's method, the same for the same system: what is compiled once stays compiled."""
    return jax.jit(method)


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """The parts of a config. Everything is a pure function of (params, inputs, key).

    Attributes:
      facts: what the data is.
      tokenizer: data to tokens and back.
      model: network, order and feed.
      objective: what is trained.
      sampling: the config's defaults for `sample`.
    """

    facts: Facts
    tokenizer: Tokenizer
    model: Autoregressive
    objective: Objective
    sampling: Mapping[str, Any]

    def init(self, key: Array) -> Params:
        """Fresh parameters of the network."""
        return self.model.init(key)

    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Array, progress: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The objective's loss of a batch of data; see `Objective`."""
        values = self.tokenizer.encode({}, batch[self.tokenizer.data_key])
        return self.objective(self.model, params, values, self.condition_of(batch), key, progress)

    def condition_of(self, batch: Mapping[str, Array]) -> Array | None:
        """The part of a batch that conditions the model: labels, embeddings, or nothing."""
        condition = self.model.generator.condition
        return (
            batch["embedding"]
            if hasattr(condition, "channels")
            else batch["label"]
            if hasattr(condition, "num_classes")
            else None
        )

    def log_prob(self, params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        """log p(tokens | condition) in nats per example, [B]; shuffled orders are drawn from the key, one per example."""
        values = self.tokenizer.encode({}, batch[self.tokenizer.data_key])
        context = self.model.context(key, len(values), self.condition_of(batch))
        return log_prob(self.model, params, values, context)

    def sample(
        self,
        params: Params,
        key: Array,
        condition: Array | None,
        drop: Array,
        settings: Sampling,
        scales: Array | None = None,
        given: Given | None = None,
    ) -> Array:
        """Tokens of len(drop) examples; see `generate`. Where an order is shuffled, given tokens come first."""
        order_key, draw_key = jax.random.split(key)
        slots = self.model.order.slots(order_key, len(drop), None if given is None else given.mask)
        context = Context(slots, condition, drop)
        return generate(self.model, params, context, draw_key, settings, scales, given)

    def settings(self, **overrides: Any) -> tuple[Sampling, np.ndarray | None]:
        """Filters and guidance scales: the config's, or the given ones.

        Args:
          **overrides: temperature, top_k, top_p, min_p, guidance_scale, guidance_schedule.

        Raises:
          UsageError: an unknown name or a value outside its range, or guidance of a model that has no condition.
        """
        check_keys(overrides, SAMPLING, "sampling")
        chosen = {k: v for k, v in {"temperature": 1.0, **self.sampling, **overrides}.items() if k in SAMPLING}
        schedule = chosen.pop("guidance_schedule", "constant")
        choose(SCHEDULES, schedule, "sampling.guidance_schedule")
        _check_range(chosen)
        scale = chosen.pop("guidance_scale", 1.0)
        filters = [name for name in ("top_k", "top_p", "min_p") if chosen.get(name) is not None]
        if filters and not self.tokenizer.vocab_size:
            raise UsageError(
                f"{filters[0]} filters a vocabulary, but these tokens are continuous; set a temperature only."
            )
        condition: Conditioner = self.model.generator.condition
        if scale != 1.0 and (condition.guidance_dropout_rate == 0 or isinstance(condition, NoCondition)):
            raise UsageError(
                f"guidance_scale={scale} needs a model trained with and without its condition; "
                "train with config.condition.kind='class' and guidance_dropout_rate > 0, or set guidance_scale=1."
            )
        scales = None if scale == 1.0 else guidance_scales(self.model.order.sizes, scale, schedule)
        kinds = {"top_k": np.int32}  # one type each, so that temperature=1 and 1.0 share a program
        return Sampling(
            **{k: np.asarray(v, kinds.get(k, np.float32)) for k, v in chosen.items() if v is not None}
        ), scales

    def describe(self) -> dict[str, str]:
        """What a run says of the system at its start."""
        order = self.model.order
        return {
            "tokens per example": str(order.length),
            "steps per example": f"{order.num_steps} ({min(order.sizes)} to {max(order.sizes)} tokens each)",
        }


def from_config(config: Mapping[str, Any], facts: Facts) -> System:
    """Builds and checks all parts; nothing is allocated or compiled.

    Args:
      config: see configs/digits.py.
      facts: what the data is.

    Raises:
      UsageError: an unknown key or kind, or parts that do not fit one another.
    """
    check_sections(config, PARTS)
    tokenizer = build(TOKENIZERS, config["tokenizer"], "tokenizer", shape=facts.shape, data_levels=facts.levels)
    order: Order = build(ORDERS, config["order"], "order", layout=tokenizer.layout)
    objective = build(OBJECTIVES, config.get("objective", {"kind": "next_token"}), "objective")
    settings: dict[str, Any] = {"kind": "decoder", "embed_dim": 128} | dict(config["model"])
    kinds = {"vocab_size": tokenizer.vocab_size, "channels": tokenizer.channels}
    head = _head(config.get("head", {}), tokenizer, kinds)
    condition = _condition(config.get("condition", {}), facts, settings["embed_dim"])
    position = tuple(tuple(int(c) for c in cell) for cell in order.position)
    generator = build(MODELS, settings, "model", head=head, condition=condition, position=position, **kinds)
    feed_config = {"kind": "auto"} | dict(config.get("feed", {}))
    if isinstance(objective, Masked) and feed_config["kind"] == "auto":
        feed_config["kind"] = "mask"
    feed = build(FEEDS, feed_config, "feed", order=order, num_prefix=condition.num_tokens)
    _check_fit(feed.remembers, objective, generator.decoder)
    _check_objective(objective, tokenizer)
    system = System(
        facts, tokenizer, Autoregressive(generator, order, feed), objective, dict(config.get("sampling", {}))
    )
    check_keys(system.sampling, (*SAMPLING, "num_samples"), "sampling")
    system.settings()
    return system


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


def _head(config: Mapping[str, Any], tokenizer: Tokenizer, kinds: Mapping[str, int]) -> Head:
    natural = "categorical" if tokenizer.vocab_size else "gaussian_mixture"
    head = build(HEADS, {"kind": natural} | dict(config), "head", **kinds)
    if hasattr(head, "vocab_size") != bool(tokenizer.vocab_size):
        tokens = "discrete" if tokenizer.vocab_size else "continuous"
        raise UsageError(
            f"config.head.kind={config['kind']!r} does not model the tokenizer's {tokens} tokens; use {natural!r}."
        )
    return head


def _condition(config: Mapping[str, Any], facts: Facts, embed_dim: int) -> Conditioner:
    natural = "class" if facts.num_classes else "none"
    config = {"kind": natural} | dict(config)
    if config["kind"] == "class" and not facts.num_classes:
        raise UsageError(
            "config.condition.kind='class' needs data with labels, which this data set does not have; use 'none'."
        )
    _check_range({k: v for k, v in config.items() if k == "guidance_dropout_rate"})
    return build(CONDITIONERS, config, "condition", embed_dim=embed_dim, num_classes=facts.num_classes)


def _check_objective(objective: Objective, tokenizer: Tokenizer) -> None:
    options = {name: getattr(objective, name) for name in ("label_smoothing", "z_loss") if hasattr(objective, name)}
    _check_range(options)
    if not tokenizer.vocab_size and any(options.values()):
        raise UsageError(
            "config.objective.label_smoothing and z_loss are for a vocabulary; set both to 0 for continuous tokens."
        )


def _check_fit(remembers: bool, objective: Objective, decoder: Decoder) -> None:
    if remembers == isinstance(objective, Masked):
        wanted = "feed 'mask' only" if isinstance(objective, Masked) else "no feed 'mask'"
        raise UsageError(
            f"This objective trains {wanted}; set config.feed.kind='auto', or another config.objective.kind."
        )
    deaf = [type(mixer).__name__ for mixer in (make() for make in decoder.mixers) if not mixer.reads_peers]
    if not remembers and deaf:
        raise UsageError(
            f"mixer {deaf[0].lower()!r} reads earlier tokens only, but feed 'mask' needs all; use mixer 'softmax'."
        )


def _check_range(settings: Mapping[str, Any]) -> None:
    """Raises UsageError on the first value that is no number in its range; None is a filter left out."""
    for name, value in settings.items():
        low, high = RANGES[name]
        if value is None:
            continue
        number = value.item() if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 else value
        whole = name != "top_k" or isinstance(number, numbers.Integral)
        real = isinstance(number, numbers.Real) and not isinstance(number, bool)
        if not (real and whole and low <= number <= high and number != math.inf):
            limits = f"at least {low}" + (f" and at most {high}" if high < math.inf else "")
            raise UsageError(f"{name}={value!r} must be a {'' if name != 'top_k' else 'whole '}number of {limits}.")
