"""Runs: train a config, load what a run left behind, evaluate it, sample from it. The commands and notebooks call these."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
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
from ar_jax.fitting import check_sections
from ar_jax.generator_run import Run
from ar_jax.models.from_softmax import becomes, from_softmax
from ar_jax.system import System, from_config
from ar_jax.tokenizer_system import TokenizerRun, TokenizerSystem, tokenizer_from_config
from ar_jax.training.program import TrainOptions, options
from ar_jax.training.workdir import plain_values, read_config, write_atomically

FACTS = "facts.json"
READING = ("flip", "num_threads", "num_workers")  # keys of config.data that say how it is read; see `train_iterator`
AnySystem = System | TokenizerSystem | ClassifierSystem | AgentSystem
NEEDED = ("seed", "data", "optimizer", "schedule", "train")
BY_PIPELINE = (*READING, "prompts", "objects")  # keys of config.data that no data set takes


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
    rows = training.own_rows(config)
    with contextlib.closing(pipeline.train_iterator(data, batch_size, config["seed"], rows, **reading)) as iterator:
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
    deciding = ("tokenizer", "order", "feed", "condition", "model", "refiner", "posterior", "head", "objective")
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
    with tempfile.TemporaryDirectory() as nowhere:  # all processes have all metrics and pictures, but one writes them
        return kind_of(run.config).evaluate(run, data, nowhere if jax.process_index() else workdir)


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
