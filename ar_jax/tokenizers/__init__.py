"""Tokenizers: what is a token. A new tokenizer is one file and a line in this table."""

from collections.abc import Callable
from typing import Any

from ar_jax.tokenizers.autoencoder import autoencoder
from ar_jax.tokenizers.bytes import Bytes
from ar_jax.tokenizers.codes import Codes
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.pixels import PixelPyramid, Pixels
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.tokenizers.symmetric import Symmetric
from ar_jax.tokenizers.titok import titok

TOKENIZERS: dict[str, Callable[..., Any]] = {
    "pixels": Pixels,
    "pixel_pyramid": PixelPyramid,
    "residual_pyramid": ResidualPyramid,
    "patches": Patches,
    "bytes": Bytes,
    "codes": Codes,
    "symmetric": Symmetric,
    "autoencoder": autoencoder,
    "titok": titok,
}
