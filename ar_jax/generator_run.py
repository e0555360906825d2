"""What one can do with a generator: draw samples, keep what is given, tell likelihoods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.protocol import Facts
from ar_jax.orders.protocol import within
from ar_jax.sampling.loop import Given
from ar_jax.system import System, as_rows, compiled, from_config, stopped
from ar_jax.trained import Trained


class Run(Trained[System]):
    """A generator with parameters."""

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
        return np.asarray(compiled(self.system.tokenizer.decode)(self.params["tokenizer"], as_rows(tokens)))

    def sample(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Draws examples as data: images [B, H, W, C] in [-1, 1], or bytes [B, length]; arguments as `sample_tokens`."""
        return self.decode(self.sample_tokens(*args, **kwargs))

    def encode(self, data: np.ndarray) -> np.ndarray:
        """Data, as `sample` returns it, as tokens on their slots; what `given` takes."""
        self._check_shape(data)
        return np.asarray(compiled(self.system.tokenizer.encode)(self.params["tokenizer"], as_rows(data)))

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
        batch: dict[str, Any] = {self.system.tokenizer.data_key: as_rows(data)}
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
        kept: Any = values.astype(like.dtype), mask  # of numpy until it is compiled
        return Given(*kept)
