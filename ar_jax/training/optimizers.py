"""Optimisers from optax under one set of names, with weight decay on matrices only.

Decay is decoupled and scaled by the learning rate everywhere: w <- w - rate * (update + weight_decay * w).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from ar_jax.config import UsageError, build, check_keys, choose, parameters
from ar_jax.training.paths import map_with_name
from ar_jax.training.schedules import Schedule

# By name, not by rank: under a scan over layers, biases and norms are [layers, dim] arrays, too.
_MATRIX = re.compile(r"(^|/)(kernel|embedding)$")
_KERNEL = re.compile(r"(^|/)kernel$")


def adamw(
    learning_rate: Schedule, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101)."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=is_matrix)


def adafactor(
    learning_rate: Schedule, weight_decay: float = 0.0, decay_rate: float = 0.8, min_dim_size_to_factor: int = 128
) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235): second moments as rows and columns. Its rate is relative to a parameter's scale."""
    return optax.adafactor(
        learning_rate,
        decay_rate=decay_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        weight_decay_rate=lambda step: weight_decay * learning_rate(step),  # optax would not scale it by the rate
        weight_decay_mask=is_matrix,
    )


def lion(
    learning_rate: Schedule, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.99
) -> optax.GradientTransformation:
    """Lion (arXiv:2302.06675): the sign of a momentum. It wants a tenth of AdamW's rate and ten times its decay."""
    return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=is_matrix)


def muon(
    learning_rate: Schedule,
    weight_decay: float = 0.0,
    b1: float = 0.95,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    consistent_rms: float = 0.2,
    adam_pattern: str = r"embed|position|head|logits",
) -> optax.GradientTransformation:
    """Muon on hidden matrices, Adam on everything else (arXiv:2502.16982).

    A hidden matrix is a parameter named `kernel`; its last two axes are (in, out), and axes before them (layers under a
    scan, experts) stack matrices that are orthogonalised one by one.

    Args:
      learning_rate: of both. `consistent_rms` gives Muon's updates the size of Adam's, so that one rate serves.
      weight_decay: on hidden matrices only.
      b1: Muon's momentum.
      adam_b1: Adam's first decay.
      adam_b2: Adam's second decay.
      consistent_rms: root mean square of a hidden matrix's update, per unit of learning rate.
      adam_pattern: regular expression; a kernel whose path it matches (input and output layers) is left to Adam.
    """

    def dimension_numbers(params: Any) -> Any:
        return map_with_name(lambda name, leaf: _muon_axes(name, leaf.shape, adam_pattern), params)

    return optax_muon(
        learning_rate,
        beta=b1,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        weight_decay=weight_decay,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=dimension_numbers,
    )


def sgd(
    learning_rate: Schedule, weight_decay: float = 0.0, b1: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformation:
    """Gradient descent with momentum `b1`."""
    return optax.chain(
        optax.trace(b1, nesterov=nesterov),
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(learning_rate),
    )


def make_optimizer(
    table: Mapping[str, Any], config: Mapping[str, Any], schedule: Schedule
) -> optax.GradientTransformation:
    """The optimiser that `config.optimizer` describes, behind a clip of the gradient's global norm.

    Args:
      table: optimisers by kind.
      config: `kind`, `learning_rate` (the schedule's peak, used there), `clip_norm` (default 1, 0 for none), and the
        parameters of that kind.
      schedule: learning rate by step.
    """
    known = set(parameters(choose(table, config.get("kind"), "optimizer.kind")))
    check_keys(config, known | {"kind", "clip_norm"}, "optimizer")
    options = {key: value for key, value in config.items() if key not in ("learning_rate", "clip_norm")}
    clip_norm = config.get("clip_norm", 1.0)
    if isinstance(clip_norm, bool) or not isinstance(clip_norm, int | float) or clip_norm < 0:
        raise UsageError(f"config.optimizer.clip_norm={clip_norm!r} must be a number above 0, or 0 for no clipping.")
    optimizer = build(table, options, "optimizer", learning_rate=schedule)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def is_matrix(params: Any) -> Any:
    """Which parameters are matrices: those named `kernel` or `embedding`. They are the ones that decay."""
    return map_with_name(lambda name, leaf: leaf.ndim >= 2 and bool(_MATRIX.search(name)), params)


def _muon_axes(name: str, shape: tuple[int, ...], adam_pattern: str) -> MuonDimensionNumbers | None:
    """The (in, out) axes of a hidden matrix, or None for what Adam is to train.

    A 1 x n matrix (a depthwise kernel) has nothing to orthogonalise.
    """
    is_hidden = _KERNEL.search(name) and len(shape) >= 2 and min(shape[-2:]) > 1 and not re.search(adam_pattern, name)
    return MuonDimensionNumbers(reduction_axis=-2, output_axis=-1) if is_hidden else None
