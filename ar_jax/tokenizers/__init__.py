"""Tokenizers: what is a token. A new tokenizer is one file and a line in this table."""

from ar_jax.tokenizers.bytes import Bytes
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.pixels import PixelPyramid, Pixels

TOKENIZERS = {"pixels": Pixels, "pixel_pyramid": PixelPyramid, "patches": Patches, "bytes": Bytes}
