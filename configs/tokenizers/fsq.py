"""Codes without a codebook: each latent rounded to a few levels (FSQ, arXiv:2309.15505)."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.tokenizers import vqgan

VARIANTS = {  # their table 1: levels for 2^10, 2^14 and 2^8 codes
    "base": dict(quantizer=dict(kind="fsq", levels=(8, 5, 5, 5)), z_channels=256),
    "fsq_14": dict(quantizer=dict(kind="fsq", levels=(8, 8, 8, 6, 5)), z_channels=256),
    "fashion": vqgan.SMALL | dict(quantizer=dict(kind="fsq", levels=(8, 6, 5)), z_channels=32),
    "smoke": vqgan.TINY | dict(quantizer=dict(kind="fsq", levels=(8, 6, 5)), z_channels=16),
}


def get_config(variant: str = "base") -> ConfigDict:
    """16 x 16 codes of 256 x 256 images; "fashion": 7 x 7 of 240 codes of Fashion-MNIST; "smoke": 4 x 4 of the digits."""
    return vqgan.recipe(variant, dict(kind="autoencoder") | choose_variant(VARIANTS, variant))
