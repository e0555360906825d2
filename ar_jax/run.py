"""Runs: train a config, load what a run left behind, evaluate it, sample from it. The commands and notebooks call these."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ar_jax import agent_system, classifier_system, tokenizer_system, training
from ar_jax.agent_system import AgentRun, AgentSystem, agent_from_config
from ar_jax.classifier_system import ClassifierRun, ClassifierSystem, classifier_from_config
from ar_jax.config import UsageError, build
from ar_jax.data import DATASETS, pipeline
from ar_jax.data.objects import with_objects
from ar_jax.data.prompts import with_prompts
from ar_jax.data.protocol import Dataset, Facts
from ar_jax.data.tfds import tfds_facts
from ar_jax.evaluation import classification, episodes, reconstruction, report
from ar_jax.models.from_softmax import becomes, from_softmax
from ar_jax.orders.protocol import within
from ar_jax.sampling.loop import Given
from ar_jax.system import System, check_sections, compiled, from_config, stopped
from ar_jax.tokenizer_system import TokenizerRun, TokenizerSystem, tokenizer_from_config
from ar_jax.training.program import TrainOptions, options
from ar_jax.training.workdir import plain_values, read_config, write_atomically

FACTS = "facts.json"
READING = ("flip", "num_threads", "num_workers")  # keys of config.data that say how it is read; see `train_iterator`
AnySystem = System | TokenizerSystem | ClassifierSystem | AgentSystem
NEEDED = ("seed", "data", "optimizer", "schedule", "train")
BY_PIPELINE = (*READING, "prompts", "objects")  # keys of config.data that no data set takes


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A system with parameters. What is compiled for a system is kept, so a second call with the same shapes is fast.

    Attributes:
      system: the parts.
      params: the network's parameters.
      config: what built them.
      step: training steps done.
    """

    system: System
    params: Any
    config: Any
    step: int = 0

    def sample_tokens(
        self,
        labels: Sequence[int] | np.ndarray | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        given: np.ndarray | None = None,
        given_mask: np.ndarray | None = None,
        num_steps: int | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Draws examples as tokens on their slots.

        Args:
          labels: [B] classes, or embeddings [B, P, C], or {"embedding": those, "mask": [B, P] bool, which are no padding};
            None draws without a condition.
          num_samples: B, where there are no labels.
          seed: the same seed gives the same samples.
          given: [B or 1, L(, C)] tokens to keep where given_mask is true: in-painting, out-painting, continuation.
          given_mask: [B or 1, L] bool.
          num_steps: leaves after so many network evaluations; see `slots_after`. None draws all tokens.
          **settings: see `System.drawing`; the config's by default.

        Returns:
          [B, L] int32 or [B, L, C] float32; 0 where nothing was drawn yet.

        Raises:
          UsageError: labels out of range, shapes that do not fit, guidance of an unconditional model, a setting out of range,
            or fewer tokens given than the order takes for told.
        """
        condition, batch_size = self._condition(labels, num_samples)
        drawing = self.system.drawing(**settings)
        if drawing.guidance_scales is not None and condition is None:
            raise UsageError("guidance_scale needs labels to guide towards; pass labels=..., or guidance_scale=1.")
        keep = self._given(given, given_mask, batch_size)
        drop, system = np.full(batch_size, condition is None), self.system
        if num_steps is not None:
            self._check_num_steps(num_steps)
            system, drawing = stopped(system, num_steps), drawing.first(num_steps)
        return np.asarray(compiled(system.sample)(self.params, jax.random.key(seed), condition, drop, drawing, keep))

    def slots_after(self, num_steps: int) -> np.ndarray:
        """[1, L] bool, the slots that so many network evaluations have drawn: a `given_mask` of another run's `sample`.

        Raises:
          UsageError: more steps than there are, or an order that deals each example other slots.
        """
        self._check_num_steps(num_steps)
        sampler = self.system.sampler
        if sampler.order.shuffled:
            raise UsageError(
                "Each example has an order of its own here, so no slots are the first of all; use 'raster'."
            )
        count = sum(sampler.step_sizes[:num_steps])
        return (np.argsort(np.argsort(sampler.order.step, kind="stable")) < count)[None]

    def _check_num_steps(self, num_steps: int) -> None:
        most = len(self.system.sampler.feed.chunks)
        if not 1 <= num_steps <= most:
            raise UsageError(f"num_steps={num_steps} must lie between 1 and {most}, the steps of a whole example.")

    def rebuilt(self, config: Mapping[str, Any] | None = None, shape: Sequence[int] | None = None) -> Run:
        """The same parameters in a system of a changed config, or on data of another shape: a larger image, a longer video.

        Rotary, relative and no positions go on beyond those that were trained; learned ones end.

        Args:
          config: None leaves it as it is.
          shape: of an example, as `facts.shape`; None leaves it.

        Raises:
          UsageError: the parameters do not fit.
        """
        own, config = self.system.facts, self.config if config is None else config
        size = own.shape if shape is None else tuple(int(side) for side in shape)
        return self._on(Facts(own.modality, size, own.levels, own.label_names), config, "This")

    def _on(self, facts: Facts, config: Any, what: str) -> Run:
        system = from_config(config, facts)
        shapes = (
            jax.tree.map(jnp.shape, params) for params in (jax.eval_shape(system.init, jax.random.key(0)), self.params)
        )
        if next(shapes) != next(shapes):
            raise UsageError(
                f"{what} gives examples of shape {facts.shape}, which this model's parameters do not fit; "
                "leave it out, or train without embeddings of places (config.model.learned_positions=False)."
            )
        return Run(system, self.params, config, self.step)

    def slots_within(self, region: np.ndarray) -> np.ndarray:
        """[1, L] bool, the slots whose cells lie inside a region [H, W] of the image: a `given_mask` of `sample`.

        Of a video the region is [T, H, W].
        """
        axes = len(self.system.facts.shape) - 1
        if np.ndim(region) != axes:
            raise UsageError(
                f"A region of {np.ndim(region)} axes is none of {self.system.facts.modality}s; give {axes}."
            )
        return within(self.system.tokenizer.layout, region)[None]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens on their slots as data: images [B, H, W, C] in [-1, 1], or bytes [B, length]."""
        return np.asarray(compiled(self.system.tokenizer.decode)(self.params["tokenizer"], jnp.asarray(tokens)))

    def sample(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Draws examples as data: images [B, H, W, C] in [-1, 1], or bytes [B, length]; arguments as `sample_tokens`."""
        return self.decode(self.sample_tokens(*args, **kwargs))

    def encode(self, data: np.ndarray) -> np.ndarray:
        """Data, as `sample` returns it, as tokens on their slots; what `given` takes."""
        self._check_shape(data)
        return np.asarray(compiled(self.system.tokenizer.encode)(self.params["tokenizer"], jnp.asarray(data)))

    def log_prob(self, data: np.ndarray, labels: Sequence[int] | np.ndarray | None = None, seed: int = 0) -> np.ndarray:
        """log p(data | labels) in nats, [B]; shuffled orders are drawn from the seed, one per example.

        Args:
          data: images [B, H, W, C] in [-1, 1], or bytes [B, length].
          labels: as in `sample_tokens`.
          seed: for shuffled orders.

        Raises:
          UsageError: a shape that the system does not take, or labels out of range.
        """
        self._check_shape(data)
        condition, _ = self._condition(labels, len(data))
        batch: dict[str, Any] = {self.system.tokenizer.data_key: jnp.asarray(data)}
        if isinstance(condition, Mapping) and "prompt" in condition:
            batch |= {"label": condition["label"], "prompt": condition["prompt"]}
        elif isinstance(condition, Mapping):
            batch |= {"embedding": condition["embedding"], "embedding_mask": condition["mask"]}
        elif condition is not None:
            batch["embedding" if condition.ndim > 1 else "label"] = condition
        return np.asarray(compiled(self.system.log_prob)(self.params, batch, jax.random.key(seed)))

    def _check_shape(self, data: np.ndarray) -> None:
        if np.shape(data)[1:] != tuple(self.system.facts.shape):
            raise UsageError(
                f"data has shape {np.shape(data)}, but this system takes [B, {', '.join(map(str, self.system.facts.shape))}]."
            )

    def _condition(self, labels: Any, num_samples: int | None) -> tuple[Any, int]:
        if labels is None:
            if not num_samples or num_samples < 1:
                raise UsageError(f"num_samples={num_samples} must be at least 1 where no labels are given.")
            return None, num_samples
        condition = self.system.model.generator.condition
        if isinstance(labels, Mapping) and "prompt" in labels:
            return self._prompted(labels, num_samples)
        if isinstance(labels, Mapping):
            embeddings, count = self._condition(labels["embedding"], num_samples)
            return {"embedding": embeddings, "mask": np.asarray(labels["mask"], bool)}, count
        labels = np.asarray(labels)
        if num_samples not in (None, len(labels)):
            raise UsageError(f"num_samples={num_samples} does not fit {len(labels)} labels.")
        if hasattr(condition, "channels"):
            if labels.shape[1:] != (condition.num_tokens, condition.channels):
                raise UsageError(
                    f"embeddings have shape {labels.shape}, but this model takes [B, {condition.num_tokens}, {condition.channels}]."
                )
            return np.asarray(labels, np.float32), len(labels)
        count = getattr(condition, "num_classes", 0)
        if not count:
            raise UsageError("this model has no condition; leave labels out and give num_samples.")
        if (
            labels.ndim != 1
            or labels.dtype.kind not in "iu"
            or not len(labels)
            or labels.min() < 0
            or labels.max() >= count
        ):
            raise UsageError(
                f"labels must be integers from 0 to {count - 1} in one dimension, not {np.unique(labels).tolist()[:5]}."
            )
        return np.asarray(labels, np.int32), len(labels)

    def _prompted(self, labels: Mapping[str, Any], num_samples: int | None) -> tuple[Any, int]:
        """Labels with prompts, {"label": [B], "prompt": [B, L] tokens}."""
        classes, count = self._condition(labels["label"], num_samples)
        slots = getattr(self.system.model.generator.condition, "num_slots", 0)
        prompt, size = np.asarray(labels["prompt"]), self.system.tokenizer.vocab_size
        fits = prompt.shape == (count, slots) and prompt.dtype.kind in "iu"
        if not fits or not 0 <= prompt.min() <= prompt.max() < size:
            raise UsageError(
                f"prompts have shape {prompt.shape}, but this model takes "
                + (f"tokens below {size}, [{count}, {slots}]." if slots else "none; give labels alone.")
            )
        return {"label": classes, "prompt": prompt.astype(np.int32)}, count

    def _given(self, given: Any, mask: Any, batch_size: int) -> Given | None:
        order = self.system.sampler.order
        needed = order.sizes[0] if order.told else 0
        if needed and (mask is None or np.atleast_2d(mask).sum(axis=1).min() < needed):
            raise UsageError(
                f"config.sampling.order.num_told={needed} takes so many tokens of each example for given; pass given and "
                "given_mask, or set it to 0."
            )
        if given is None and mask is None:
            return None
        if given is None or mask is None:
            raise UsageError("given and given_mask belong together; pass both.")
        like = jax.eval_shape(lambda: self.system.model.empty_values(batch_size))
        try:
            values, mask = np.broadcast_to(given, like.shape), np.broadcast_to(np.asarray(mask, bool), like.shape[:2])
        except ValueError as error:
            raise UsageError(
                f"given {np.shape(given)} and given_mask {np.shape(mask)} do not fit tokens of shape {like.shape}."
            ) from error
        vocab_size = self.system.tokenizer.vocab_size
        if vocab_size and mask.any() and not (0 <= values[mask].min() and values[mask].max() < vocab_size):
            raise UsageError(f"given tokens must lie between 0 and {vocab_size - 1}.")
        return Given(jnp.asarray(values, like.dtype), jnp.asarray(mask))


AnyRun = Run | TokenizerRun | ClassifierRun | AgentRun


def load_data(config: Mapping[str, Any]) -> Dataset:
    """The data set that `config.data` names."""
    check_sections(config, NEEDED)
    options = dict(config["data"])
    data: Dataset = build(DATASETS, {k: v for k, v in options.items() if k not in BY_PIPELINE}, "data")
    if options.get("objects") is not None:
        data = with_objects(data, options["objects"])
    if data.modality == "episodes" and kind_of(config) is not KINDS[agent_system.KIND]:
        raise UsageError(
            f"config.data.kind='episodes' is for agents; set config.objective.kind={agent_system.KIND!r}, or other data."
        )
    return with_prompts(data) if options.get("prompts", False) else data


def load_facts(config: Mapping[str, Any]) -> Facts:
    """What the data set that `config.data` names is; of tensorflow_datasets, whether or not it is prepared here."""
    data = dict(config["data"])
    if data.get("kind") != "tfds":
        return load_data(config)
    return build({"tfds": tfds_facts}, {k: v for k, v in data.items() if k not in BY_PIPELINE}, "data")


def build_run(config: Mapping[str, Any], facts: Facts | None = None) -> AnyRun:
    """A run with fresh parameters.

    Args:
      config: see configs/digits.py.
      facts: what the data is; None loads the data to see.
    """
    config = with_tokenizer(config)
    system = system_of(config, facts or load_data(config))
    params = jax.jit(system.init)(jax.random.key(config["seed"]))
    start = _trained_before(config)
    return kind_of(config).run(system, params if start is None else start(params), config)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a config may train, and what is done with it.

    Attributes:
      system: builds it from a config and facts.
      run: it, with parameters.
      held_out: its metrics of the held-out examples.
      picture: what it shows of itself while it is trained, or None.
      evaluate: all that evaluation reports, written to a directory.
      count: what there is in an example, by name, such as {"tokens": 256}.
    """

    system: Callable[[Mapping[str, Any], Facts], Any]
    run: Callable[..., Any]
    held_out: Callable[[Any, Dataset], dict[str, float]]
    picture: Callable[[Any, Dataset], np.ndarray | None]
    evaluate: Callable[[Any, Dataset, str | Path], dict[str, Any]]
    count: Callable[[Any], dict[str, int]] = lambda system: {}


def kind_of(config: Mapping[str, Any]) -> Kind:
    """What a config trains: its objective says so, and most train a generator."""
    objective: Any = config.get("objective")
    return KINDS.get(objective.get("kind") if hasattr(objective, "get") else "", GENERATOR)


def system_of(config: Mapping[str, Any], facts: Facts) -> AnySystem:
    """What a config trains, built: a generator, a tokenizer, a classifier or an agent."""
    return kind_of(config).system(config, facts)


def train(config: Mapping[str, Any], workdir: str | Path | None = None) -> AnyRun:
    """Trains a config in a directory, from wherever the run there stands; see `ar_jax.training.fit`.

    Args:
      config: see configs/digits.py.
      workdir: keeps config, checkpoints and metrics; None keeps nothing, for trying things out.

    Raises:
      UsageError: config, data or directory are not as they should be; nothing has been overwritten.
    """
    if workdir is None:
        with tempfile.TemporaryDirectory() as folder:
            return train(config, folder)
    config, kind = with_tokenizer(config), kind_of(config)
    data = load_data(config)
    system = kind.system(config, data)
    report.check_eval(config)
    _check_facts(Path(workdir), data)
    reading = {key: value for key, value in dict(config["data"]).items() if key in READING}
    batch_size = options(TrainOptions, config, "train").batch_size
    with contextlib.closing(pipeline.train_iterator(data, batch_size, config["seed"], **reading)) as iterator:
        state = training.fit(
            system,
            iterator,
            config,
            workdir,
            evaluate=lambda params, step: kind.held_out(kind.run(system, params, config, step), data),
            sample=lambda params, step: kind.picture(kind.run(system, params, config, step), data),
            describe=system.describe(),
            count=kind.count(system),
            prepare=lambda directory: write_atomically(directory / FACTS, json.dumps(_facts(data))),
            adopt=_trained_before(config),
        )
    return kind.run(system, state.averaged_params, config, int(state.step))


def with_tokenizer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with its tokenizer written out where it names only the directory that one was trained in.

    `config.tokenizer.workdir` is that directory; other keys override those that the tokenizer was trained with.

    Raises:
      UsageError: there is no run in that directory, or its tokenizer was not trained there.
    """
    own = dict(config.get("tokenizer") or {})
    if not own.get("workdir"):
        return config
    trained = read_config(own["workdir"])
    if kind_of(trained) is not KINDS[tokenizer_system.KIND]:
        raise UsageError(
            f"config.tokenizer.workdir={own['workdir']!r} holds no tokenizer; train one, as configs/tokenizers do."
        )
    return ConfigDict(plain_values(config) | {"tokenizer": trained.tokenizer.to_dict() | own})


def _trained_before(config: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """What puts the parameters that were trained before in the place of fresh ones, or None where there are none."""
    whole, tokenizer = dict(config["train"]).get("init_from"), dict(config.get("tokenizer") or {}).get("workdir")
    for workdir in filter(None, (whole, tokenizer)):
        read_config(workdir)  # a missing directory is told now, before anything is written

    def start(params: Any) -> Any:
        if whole and becomes(read_config(whole), config):
            params = from_softmax(load(whole).params, params)
        elif whole:
            params = load(whole, ConfigDict(plain_values(read_config(whole)) | _same_model(config))).params
        return params | {"tokenizer": load(tokenizer).params["tokenizer"]} if tokenizer else params

    return start if whole or tokenizer else None


def _same_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that decide the parameters of a model."""
    deciding = ("tokenizer", "order", "feed", "condition", "model", "refiner", "head", "objective")
    return {k: v for k, v in plain_values(config).items() if k in deciding}


def load(workdir: str | Path, config: Mapping[str, Any] | None = None) -> AnyRun:
    """The newest state of the run in a directory (its averaged parameters, where it keeps an average).

    `config.eval.checkpoint` names another: the number of its step, or "best" by `config.checkpoint.best_metric`.

    Args:
      workdir: the directory that train.py was given.
      config: overrides the run's own config, as long as the parameters fit.

    Raises:
      UsageError: there is no run, it is damaged, or the config does not fit its parameters.
    """
    config = read_config(workdir) if config is None else config
    check_sections(config, NEEDED)
    report.check_eval(config)
    system = system_of(config, read_facts(workdir))
    state = training.load(system, config, workdir, step=(config.get("eval") or {}).get("checkpoint", "newest"))
    return kind_of(config).run(system, state.averaged_params, config, int(state.step))


def read_facts(workdir: str | Path) -> Facts:
    """What the data of the run in a directory is."""
    file = Path(workdir) / FACTS
    try:
        stored = json.loads(file.read_text())
        return Facts(stored["modality"], tuple(stored["shape"]), stored["levels"], tuple(stored["label_names"]))
    except FileNotFoundError as error:
        raise UsageError(f"{file} does not exist; give the --workdir of a run that train.py has started.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); train again in another --workdir.") from error


def _facts(data: Facts) -> dict[str, Any]:
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(Facts)}


def _check_facts(workdir: Path, data: Facts) -> None:
    """Raises UsageError where the run in a directory was trained on other data than this."""
    if (workdir / FACTS).exists() and _essence(read_facts(workdir)) != _essence(data):
        raise UsageError(
            f"{workdir} holds a run on other data than config.data gives now; choose another --workdir, "
            "or give that run's data."
        )


def _essence(facts: Facts) -> tuple[Any, ...]:
    """What a model depends on: the names of the classes are for people."""
    return facts.modality, tuple(facts.shape), facts.levels, len(facts.label_names)


def evaluate(run: AnyRun, workdir: str | Path) -> dict[str, Any]:
    """Metrics of the held-out data, and of sampling, written with pictures to `workdir`/eval.

    See `report.evaluate`, `reconstruction.evaluate` for tokenizers, `classification.evaluate` for classifiers, and
    `episodes.evaluate` for agents.
    """
    data = load_data(run.config)
    _check_facts(Path(workdir), data)
    return kind_of(run.config).evaluate(run, data, workdir)


def on_other_data(run: Run) -> tuple[Run, Dataset] | None:
    """The same parameters on the data that `config.eval.data` changes `config.data` to, and these data; None without it.

    Raises:
      UsageError: the parameters do not fit examples of another shape.
    """
    changes = plain_values(run.config).get("eval", {}).get("data")
    if not changes:
        return None
    config = ConfigDict(plain_values(run.config))
    config.data.update(changes)
    data = load_data(config)
    return dataclasses.replace(run._on(data, config, f"config.eval.data={changes}"), config=run.config), data


GENERATOR = Kind(
    from_config,
    Run,
    report.held_out,
    lambda run, data: report.sample_grid(run),
    lambda run, data, workdir: report.evaluate(run, data, workdir, on_other_data(run)),
    lambda system: {"tokens": system.model.order.length},
)
KINDS = {  # by config.objective.kind
    tokenizer_system.KIND: Kind(
        tokenizer_from_config,
        TokenizerRun,
        reconstruction.held_out,
        reconstruction.reconstruction_grid,
        reconstruction.evaluate,
    ),
    classifier_system.KIND: Kind(
        classifier_from_config,
        ClassifierRun,
        classification.held_out,
        lambda run, data: None,
        classification.evaluate,
    ),
    agent_system.KIND: Kind(
        agent_from_config,
        AgentRun,
        episodes.held_out,
        lambda run, data: None,
        episodes.evaluate,
        lambda system: {"steps": system.objective.rollout_length},
    ),
}
