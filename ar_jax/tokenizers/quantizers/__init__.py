"""Quantizers: what stands between encoder and decoder. A new one is one file and a line in this table."""

from collections.abc import Callable
from typing import Any

from ar_jax.tokenizers.quantizers.fsq import FiniteScalarQuantizer
from ar_jax.tokenizers.quantizers.kl import GaussianPosterior
from ar_jax.tokenizers.quantizers.lfq import LookupFreeQuantizer
from ar_jax.tokenizers.quantizers.multi_scale import MultiScaleQuantizer
from ar_jax.tokenizers.quantizers.residual_vq import ResidualQuantizer
from ar_jax.tokenizers.quantizers.vq import VectorQuantizer

QUANTIZERS: dict[str, Callable[..., Any]] = {
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "kl": GaussianPosterior,
    "multi_scale_vq": MultiScaleQuantizer,
    "residual_vq": ResidualQuantizer,
}
