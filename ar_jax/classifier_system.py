"""A classifier in training, and what one can do with it afterwards: the counterpart of `system.System` and `run.Run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, build, check_keys
from ar_jax.data.protocol import Facts
from ar_jax.mixers.common.statistics import is_statistic
from ar_jax.models.classifiers import build_classifier
from ar_jax.system import as_rows, compiled
from ar_jax.trained import Trained
from ar_jax.training.paths import named_leaves

Params = Any
KIND = "classification"
SECTIONS = ("seed", "data", "model", "objective", "optimizer", "schedule", "train", "checkpoint", "eval", "mesh")
MOMENTS = "batch_stats"  # Linen's name for what batch norms keep
KNOWN = "object"  # what data may tell of pixels


@dataclasses.dataclass(frozen=True)
class Classification:
    """The mean cross-entropy of the classes.

    Attributes:
      label_smoothing: the part of a target that is spread over all classes.
      shift: images are moved by up to this part of their sides at random, their border repeated.

    Raises:
      UsageError: a value out of its range.
    """

    label_smoothing: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("label_smoothing", "shift"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"config.objective.{name}={getattr(self, name)} must lie in [0, 1).")

    def __call__(self, logits: Array, labels: Array) -> Array:
        """Of logits [B, classes] and labels [B], []."""
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), self.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierSystem:
    """A classifier and its objective, a `Task` of the trainer.

    Parameters are {"classifier": its own, "batch_stats": what its batch norms keep, if it has any}.

    Attributes:
      facts: what the data is.
      classifier: see `ar_jax.models.classifiers`.
      objective: the loss.
    """

    facts: Facts
    classifier: nn.Module
    objective: Classification

    @property
    def data_key(self) -> str:
        """The name of what is classified in a batch."""
        return self.facts.modality

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        dtype = jnp.int32 if self.facts.modality == "text" else jnp.float32
        variables = self.classifier.init(key, jnp.ones((1, *self.facts.shape), dtype))
        kept = {MOMENTS: variables[MOMENTS]} if MOMENTS in variables else {}
        return {"classifier": variables["params"]} | kept

    def frozen(self, name: str) -> bool:
        """See Task: moments are no matter of gradients."""
        return name.startswith(f"{MOMENTS}/") or self.measured(name)

    def measured(self, name: str) -> bool:
        """See Task."""
        return is_statistic(name)

    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Array, progress: Array
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """See Task; `accuracy` is logged, too."""
        shift_key, dropout_key, noise_key = jax.random.split(key, 3)
        read = [batch[name] for name in (self.data_key, KNOWN) if name in batch]
        if self.objective.shift:
            read = [shifted(a, self.objective.shift, shift_key) for a in read]
        rngs, collections = {"dropout": dropout_key, "noise": noise_key}, [MOMENTS]
        logits, after = self.classifier.apply(
            _variables(params), *read[:1], True, *read[1:], rngs=rngs, mutable=collections
        )
        accuracy = (logits.argmax(axis=-1) == batch["label"]).mean()
        return self.objective(logits, batch["label"]), {"accuracy": accuracy}, named_leaves(dict(after))

    def logits(self, params: Params, data: Array) -> Array:
        """Images [B, H, W, C] or texts [B, length] to [B, classes] float32."""
        return self.classifier.apply(_variables(params), data).astype(jnp.float32)  # type: ignore[union-attr]

    def describe(self) -> dict[str, str]:
        """What a run says of the classifier at its start."""
        return {"classes": str(self.facts.num_classes)}


def _variables(params: Params) -> dict[str, Any]:
    return {"params": params["classifier"]} | {name: params[name] for name in (MOMENTS,) if name in params}


def shifted(images: Array, part: float, key: Array) -> Array:
    """Images [B, H, W, ...], each moved by up to a part of its sides at random, its border repeated."""
    far = [int(size * part) for size in images.shape[1:3]]
    around = [(0, 0), *((reach, reach) for reach in far), *((0, 0),) * (images.ndim - 3)]
    padded = jnp.pad(images, around, mode="edge")
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * jnp.asarray(far)[None] + 1)
    zeros = (0,) * (images.ndim - 3)
    cut = lambda image, start: jax.lax.dynamic_slice(image, (*start, *zeros), images.shape[1:])  # noqa: E731
    return jax.vmap(cut)(padded, starts)


class ClassifierRun(Trained[ClassifierSystem]):
    """A classifier with parameters."""

    def logits(self, data: np.ndarray) -> np.ndarray:
        """Images [B, H, W, C] in [-1, 1], or texts [B, length], to logits [B, classes] float32.

        Raises:
          UsageError: data of another shape.
        """
        facts = self.system.facts
        if np.shape(data)[1:] != tuple(facts.shape):
            shape = ", ".join(map(str, facts.shape))
            raise UsageError(f"{facts.modality}s have shape {np.shape(data)}, but this classifier takes [B, {shape}].")
        return np.asarray(compiled(self.system.logits)(self.params, as_rows(data)))

    def classify(self, data: np.ndarray) -> list[str]:
        """The names of the likeliest classes of data as `logits` takes them."""
        return [self.system.facts.label_names[i] for i in self.logits(data).argmax(axis=-1)]


def classifier_from_config(config: Mapping[str, Any], facts: Facts) -> ClassifierSystem:
    """Builds and checks classifier and objective; nothing is allocated or compiled.

    Args:
      config: see configs/classifiers/encoder.py.
      facts: what the data is.

    Raises:
      UsageError: an unknown key or kind, a section that has no meaning here, or data without classes.
    """
    check_keys(config, SECTIONS, "")
    if facts.num_classes < 2:
        raise UsageError(
            f"config.objective.kind={KIND!r} needs data of at least two classes, which config.data does not have."
        )
    objective: Classification = build({KIND: Classification}, config["objective"], "objective")
    if objective.shift and facts.modality != "image":
        raise UsageError(f"config.objective.shift moves images, but the data is {facts.modality}; leave it out.")
    system = ClassifierSystem(facts, build_classifier(config["model"], facts), objective)
    jax.eval_shape(system.init, jax.random.key(0))  # an option that a part refuses is told now
    return system
