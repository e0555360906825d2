"""A system: everything that a config names, built, with the functions that training, evaluation and notebooks call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ar_jax.config import UsageError, build, check_keys, choose
from ar_jax.data.protocol import Facts
from ar_jax.feeds import FEEDS
from ar_jax.feeds.protocol import BLANK, Feed
from ar_jax.fitting import (
    check_cascade,
    check_fit,
    check_joint,
    check_objective,
    check_outputs,
    check_posterior,
    check_range,
    check_sections,
    is_masked,
)
from ar_jax.heads import HEADS
from ar_jax.heads.protocol import Head, Sampling
from ar_jax.mixers.common.statistics import is_statistic
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.build import build_generator
from ar_jax.models.cascade import Cascade
from ar_jax.models.conditioning import CONDITIONERS, Condition, Conditioner, NoCondition
from ar_jax.models.generator import Context, Generator
from ar_jax.objectives import OBJECTIVES
from ar_jax.objectives.protocol import Objective
from ar_jax.orders import ORDERS
from ar_jax.orders.protocol import Order
from ar_jax.sampling.guidance import (
    BY_TOKEN,
    SCHEDULES,
    TEMPERATURE_SCHEDULES,
    guidance_scales,
    temperature_factors,
)
from ar_jax.sampling.likelihood import log_prob
from ar_jax.sampling.loop import Given, NoiseOfStep, drawn_from, generate
from ar_jax.tokenizers import TOKENIZERS
from ar_jax.tokenizers.protocol import Tokenizer
from ar_jax.training.mesh import one_order

Params = Any
PARTS = ("tokenizer", "order", "model")
FILTERS = ("temperature", "confidence_temperature", "top_k", "top_p", "min_p")
SAMPLING = (
    *FILTERS, "temperature_schedule", "guidance_scale", "guidance_schedule", "guidance_power", "guidance_steps",
)  # fmt: skip


@functools.lru_cache(
    maxsize=256
)  # of a few programs for each run that is compared: one more, and all compile anew in turns
def compiled(method: Callable[..., Any]) -> Any:
    """`jax.jit` of a system's method, the same for the same system: what is compiled once stays compiled.

    It is traced for the mesh that its arguments lie on, over whose devices kernels cut their arrays; each device, and so
    each process, has the whole result.
    """

    @functools.cache
    def jitted(mesh: Mesh | None) -> Any:
        if mesh is None:
            return jax.jit(method)
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.jit(method, out_shardings=whole, compiler_options=one_order(mesh))

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        mesh = mesh_of(args)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return jitted(mesh)(*args)

    call.jitted = jitted  # type: ignore[attr-defined]
    return call


def as_rows(data: Any) -> Any:
    """Data for a compiled function: arrays that lie on devices stay there, all else is an array of numpy's."""
    return data if isinstance(data, jax.Array) else np.asarray(data)


def mesh_of(arrays: Any) -> Mesh | None:
    """The devices that arrays of a pytree lie on as a mesh, or None where there is no such array."""
    shardings = (leaf.sharding for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)


@functools.lru_cache(maxsize=32)
def stopped(system: System, num_steps: int) -> System:
    """The system whose sampler leaves after so many network evaluations; the same for the same system."""
    feed = dataclasses.replace(system.sampler.feed, chunks=system.sampler.feed.chunks[:num_steps])
    return dataclasses.replace(system, sampler=dataclasses.replace(system.sampler, feed=feed))


@struct.dataclass
class Drawing:
    """How a sampler draws; all values are traced.

    Attributes:
      filters: temperature and filters.
      guidance_scales: [num_steps], or of each token [num_steps, L], or None where nothing guides.
      temperature_factors: [num_steps], or None where the temperature stays.
    """

    filters: Sampling
    guidance_scales: ArrayLike | None = None
    temperature_factors: ArrayLike | None = None

    def first(self, num_steps: int) -> Drawing:
        """Of the first so many steps."""
        scales, factors = (
            a if a is None else np.asarray(a)[:num_steps] for a in (self.guidance_scales, self.temperature_factors)
        )
        return Drawing(self.filters, scales, factors)


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """The parts of a config. Everything is a pure function of (params, inputs, key).

    Parameters are {"generator": the network's, "tokenizer": the tokenizer's}; the tokenizer's stay as they are while the
    network is trained. A posterior with a network of its own has "posterior", too.

    Attributes:
      facts: what the data is.
      tokenizer: data to tokens and back.
      model: network, order and feed.
      sampler: the same network with the order and feed that it samples in.
      objective: what is trained.
      sampling: the config's defaults for `sample`.
    """

    facts: Facts
    tokenizer: Tokenizer
    model: Autoregressive
    sampler: Autoregressive
    objective: Objective
    sampling: Mapping[str, Any]

    def init(self, key: Array) -> Params:
        """Fresh parameters of the network and the tokenizer."""
        return self.model.init(key) | {"tokenizer": self.tokenizer.init(key)}

    def frozen(self, name: str) -> bool:
        """See Task: the tokenizer is not trained here, and statistics are measured."""
        by_objective = getattr(self.objective, "frozen", None)
        return name.startswith("tokenizer/") or self.measured(name) or bool(by_objective and by_objective(name))

    def measured(self, name: str) -> bool:
        """See Task."""
        return is_statistic(name)

    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Array, progress: Array
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """The objective's loss of a batch of data; see `Objective` and `Task`.

        Where the batch has `slots` [B, L], these are the orders of its examples, in place of those that would be drawn.
        """
        encode_key, key = jax.random.split(key)
        values = self.tokens_of(params, batch, encode_key)
        model = self.model.dealt(batch["slots"]) if "slots" in batch else self.model
        loss, metrics = self.objective(model, params, values, self.condition_of(params, batch), key, progress)
        return loss, metrics, {}

    def without_gradient(self, params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        """See Program.model_flops: the tokens; parts of the loss that no gradient passes through."""
        return self.tokens_of(params, batch, key)

    def tokens_of(self, params: Params, batch: Mapping[str, Array], key: Array | None = None) -> Array:
        """The tokens of a batch of data, or those that it already holds; drawn with the key where they are random."""
        if "tokens" in batch:
            return batch["tokens"]
        return self.tokenizer.encode(params["tokenizer"], batch[self.tokenizer.data_key], key)

    def condition_of(self, params: Params, batch: Mapping[str, Array]) -> Condition:
        """The part of a batch that conditions the model: labels, embeddings (with their mask, if any), or nothing.

        Prompts, where there are any, are tokens or data like the batch's own.
        """
        condition = self.model.generator.condition
        if "prompt" in batch and hasattr(condition, "num_slots"):
            prompt = batch["prompt"]
            if prompt.ndim > 2:
                prompt = self.tokenizer.encode(params["tokenizer"], prompt)
            return {"label": batch["label"], "prompt": prompt}
        if hasattr(condition, "num_classes"):
            return batch["label"]
        if not hasattr(condition, "channels"):
            return None
        mask = batch.get("embedding_mask")
        return batch["embedding"] if mask is None else {"embedding": batch["embedding"], "mask": mask}

    def log_prob(self, params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        """log p(tokens | condition) in nats per example, [B]; shuffled orders are drawn from the key, one per example.

        Where the objective trains a lower bound, this is a draw of it.
        """
        values, bound = self.tokens_of(params, batch), getattr(self.objective, "bound", None)
        if bound is not None:
            return bound(self.model, params, values, self.condition_of(params, batch), key)
        context = self.model.context(key, len(values), self.condition_of(params, batch))
        return log_prob(self.model, params, values, context)

    def sample(
        self,
        params: Params,
        key: Array,
        condition: Condition,
        drop: Array,
        drawing: Drawing,
        given: Given | None = None,
    ) -> Array:
        """Tokens of len(drop) examples; see `generate`. Where an order is shuffled, given tokens come first."""
        order_key, draw_key = jax.random.split(key)
        slots = self.sampler.order.slots(order_key, len(drop), None if given is None else given.mask)
        condition = self.sampler.complete(condition, order_key, len(drop))
        return self.sample_in_order(params, Context(slots, condition, drop), drawn_from(draw_key), drawing, given)

    def sample_in_order(
        self, params: Params, context: Context, noise: NoiseOfStep, drawing: Drawing, given: Given | None = None
    ) -> Array:
        """Tokens, in an order that the context names, from given noise; see `generate`."""
        scales, factors = drawing.guidance_scales, drawing.temperature_factors
        return generate(self.sampler, params, context, noise, drawing.filters, scales, given, factors)

    def drawing(self, **overrides: Any) -> Drawing:
        """How to draw: the config's defaults, or what is given.

        Args:
          **overrides: temperature, confidence_temperature, top_k, top_p, min_p, temperature_schedule, guidance_scale,
            guidance_schedule, guidance_power, guidance_steps.

        Raises:
          UsageError: an unknown name or a value outside its range, or guidance of a model that has no condition.
        """
        check_keys(overrides, SAMPLING, "sampling")
        chosen = {k: v for k, v in {"temperature": 1.0, **self.sampling, **overrides}.items() if k in SAMPLING}
        schedule, cooling = chosen.pop("guidance_schedule", "constant"), chosen.pop("temperature_schedule", "constant")
        choose(SCHEDULES | BY_TOKEN, schedule, "sampling.guidance_schedule")
        choose(TEMPERATURE_SCHEDULES, cooling, "sampling.temperature_schedule")
        check_range(chosen)
        scale, power, steps = (
            chosen.pop(f"guidance_{k}", d) for k, d in (("scale", 1.0), ("power", 1.0), ("steps", None))
        )
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
        sizes = self.sampler.step_sizes
        kinds = {"top_k": np.int32}  # one type each, so that temperature=1 and 1.0 share a program
        return Drawing(
            Sampling(**{k: np.asarray(v, kinds.get(k, np.float32)) for k, v in chosen.items() if v is not None}),
            None if scale == 1.0 else guidance_scales(sizes, scale, schedule, power, steps),
            None if cooling == "constant" else temperature_factors(len(sizes), cooling),
        )

    def describe(self) -> dict[str, str]:
        """What a run says of the system at its start."""
        sizes = self.sampler.step_sizes
        return {
            "tokens per example": str(self.sampler.order.length),
            "steps per example": f"{len(sizes)} ({min(sizes)} to {max(sizes)} tokens each)",
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
    settings = {k: v for k, v in config["tokenizer"].items() if k != "workdir"}
    tokenizer = build(TOKENIZERS, settings, "tokenizer", shape=facts.shape, data_levels=facts.levels)
    order: Order = build(ORDERS, config["order"], "order", layout=tokenizer.layout)
    objective = build(OBJECTIVES, config.get("objective", {"kind": "next_token"}), "objective")
    spare = bool(tokenizer.vocab_size) * bool(dict(config["model"]).get("blank_token", False))
    tokens = {"vocab_size": tokenizer.vocab_size + spare, "channels": tokenizer.channels}
    embed_dim = dict(config["model"]).get("embed_dim", 128)
    head = _head(config, tokenizer, tokens | {"embed_dim": embed_dim, "length": order.length})
    perceived = {"num_slots": order.length, "vocab_size": tokenizer.vocab_size}
    condition = _condition(config.get("condition", {}), facts, embed_dim, perceived)
    make_feed = functools.partial(_feed, config.get("feed", {}), objective, tokenizer, condition.num_tokens)
    feed = make_feed(order)
    content = {"vocab_size": 0, "channels": tokenizer.resample_channels} if feed.resampled else tokens
    vectors = _vectors(tokenizer) if dict(config["model"]).get("codebook_inputs", False) else None
    if vectors is not None:
        content = {"vocab_size": 0, "channels": tokenizer.vector_channels}
    position = tuple(tuple(int(c) for c in cell[: feed.place_axes]) for cell in order.position)
    blank = any((np.asarray(chunk.source) == BLANK).any() for chunk in feed.chunks)
    fed: dict[str, Any] = {"blank": blank, "num_transition": feed.num_transition, "num_merged": feed.num_outputs}
    fed["reads_near"] = feed.chunks[0].near is not None
    generator: Generator | Cascade = build_generator(config["model"], head, condition, position, **fed, **content)
    if (feed.chunks[-1].part is None) == ("refiner" in config):
        raise UsageError(
            "config.refiner is the second network of config.feed.kind='refine', written as config.model; set both or neither."
        )
    if hasattr(condition, "num_slots") and not generator.vocab_size:
        raise UsageError("config.condition.kind='prompt' needs tokens that are fed by their numbers; use 'class' here.")
    if "refiner" in config:
        generator = _cascade(config, tokenizer, facts, position)
    posterior = None
    if "posterior" in config:
        posterior = _network(config, "posterior", tokenizer, facts, position, tokens, perceived, fed | content)
        check_posterior(feed, objective, posterior)
    check_fit(feed, objective, generator)
    check_outputs(feed, generator)
    check_objective(objective, tokenizer)
    check_joint(head, objective, order)
    check_cascade(generator, objective)
    token_shape = () if tokenizer.vocab_size else (tokenizer.channels,)
    resample = tokenizer.resample if feed.resampled else None
    model = Autoregressive(generator, order, feed, token_shape, resample, vectors, posterior)
    if order.told:
        raise UsageError("config.order.num_told is for sampling; set config.sampling.order.num_told instead.")
    if order.adaptive:
        raise UsageError("config.order.adaptive is for sampling; set config.sampling.order.adaptive instead.")
    if hasattr(objective, "check"):
        objective.check(model)
    sampling = dict(config.get("sampling", {}))
    sampler_order = sampling.pop("order", None)
    sampler = model
    if sampler_order is not None:
        sampled: Order = build(ORDERS, sampler_order, "sampling.order", layout=tokenizer.layout)
        check_joint(head, objective, sampled)
        sampler = model.with_order(sampled, make_feed(sampled))
    check_keys(sampling, (*SAMPLING, "num_samples"), "sampling")
    system = System(facts, tokenizer, model, sampler, objective, sampling)
    system.drawing()
    return system


def _vectors(tokenizer: Any) -> Callable[[Any, Array], Array]:
    """The tokenizer's vectors of tokens; UsageError where a token has none of its own."""
    if not getattr(tokenizer, "vector_channels", 0):
        raise UsageError(
            "config.model.codebook_inputs needs a tokenizer with one vector for each token, such as 'autoencoder' with "
            "quantizer 'vq', or 'pixels'; set it to False."
        )
    return tokenizer.vectors


def _feed(config: Mapping[str, Any], objective: Objective, tokenizer: Tokenizer, num_prefix: int, order: Order) -> Feed:
    """The feed of an order; by default the one that serves it best, or that the objective trains."""
    config = {"kind": "auto"} | dict(config)
    if is_masked(objective) and config["kind"] == "auto":
        config["kind"] = "mask"
    if order.adaptive and config["kind"] not in ("mask", "query"):
        raise UsageError(
            "config.sampling.order.adaptive needs config.feed.kind='query', or feed 'mask', which objective 'masked' trains."
        )
    if order.told and config["kind"] not in ("mask", "query"):
        raise UsageError("num_told needs config.feed.kind='query', or feed 'mask', which objective 'masked' trains.")
    resampled = getattr(tokenizer, "resample_channels", 0) > 0
    return build(FEEDS, config, "feed", order=order, num_prefix=num_prefix, resampled=resampled)


def _cascade(
    config: Mapping[str, Any], tokenizer: Tokenizer, facts: Facts, position: tuple[tuple[int, ...], ...]
) -> Cascade:
    """The networks of config.model and config.refiner: both are fed coarse codes, and each draws its own kind."""
    sizes = getattr(tokenizer, "vocab_sizes", (tokenizer.vocab_size,))
    sizes = sizes * 2 if len(sizes) == 1 else sizes
    parts = []
    for section, drawn in zip(("model", "refiner"), sizes, strict=True):
        fed, kinds = {"vocab_size": sizes[0], "channels": 0, "blank": False}, {"vocab_size": drawn, "channels": 0}
        parts.append(_network(config, section, tokenizer, facts, position, kinds, {}, fed))
    return Cascade(*parts)


def _network(
    config: Mapping[str, Any],
    section: str,
    tokenizer: Tokenizer,
    facts: Facts,
    position: tuple[tuple[int, ...], ...],
    drawn: Mapping[str, int],
    perceived: Mapping[str, int],
    fed: Mapping[str, Any],
) -> Generator:
    """The network of one section, with a head, of what is `drawn`, and a conditioner of its own."""
    embed_dim = dict(config[section]).get("embed_dim", 128)
    head = _head(config, tokenizer, {**drawn, "embed_dim": embed_dim, "length": len(position)})
    condition = _condition(config.get("condition", {}), facts, embed_dim, perceived)
    return build_generator(config[section], head, condition, position, **fed)


def _head(config: Mapping[str, Any], tokenizer: Tokenizer, kinds: Mapping[str, int]) -> Head:
    config = config.get("head", {})
    natural = "categorical" if tokenizer.vocab_size else "gaussian_mixture"
    head = build(HEADS, {"kind": natural} | dict(config), "head", **kinds)
    if not hasattr(head, "vocab_size" if tokenizer.vocab_size else "channels"):
        tokens = "discrete" if tokenizer.vocab_size else "continuous"
        raise UsageError(
            f"config.head.kind={config['kind']!r} does not model the tokenizer's {tokens} tokens; use {natural!r}."
        )
    if hasattr(head, "check"):
        head.check()
    return head


def _condition(config: Mapping[str, Any], facts: Facts, embed_dim: int, perceived: Mapping[str, int]) -> Conditioner:
    """The conditioner; `perceived` are the fields of one that is shown images."""
    natural = "class" if facts.num_classes else "none"
    config = {"kind": natural} | dict(config)
    if config["kind"] in ("class", "prompt") and not facts.num_classes:
        raise UsageError(
            f"config.condition.kind={config['kind']!r} needs data with labels, which this data set does not have; use 'none'."
        )
    if config["kind"] == "prompt" and not perceived.get("vocab_size", 0):
        raise UsageError(
            "config.condition.kind='prompt' is of discrete tokens that one network is fed; use 'class' here."
        )
    check_range({k: v for k, v in config.items() if k == "guidance_dropout_rate"})
    given = {"embed_dim": embed_dim, "num_classes": facts.num_classes} | dict(perceived)
    return build(CONDITIONERS, config, "condition", **given)
