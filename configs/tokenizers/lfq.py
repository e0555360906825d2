"""Codes of bits: the sign of each channel of a latent (lookup-free quantization, MAGVIT-v2, arXiv:2310.05737)."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.tokenizers import vqgan

VARIANTS = {
    "base": dict(quantizer=dict(kind="lfq", channels=18), z_channels=256),  # 2^18 codes
    "fashion": vqgan.SMALL | dict(quantizer=dict(kind="lfq", channels=8), z_channels=32),
    "smoke": vqgan.TINY | dict(quantizer=dict(kind="lfq", channels=6), z_channels=16),
}


def get_config(variant: str = "base") -> ConfigDict:
    """16 x 16 codes of 18 bits; "fashion": 7 x 7 of 8 bits of Fashion-MNIST; "smoke": 4 x 4 of 6 bits of the digits."""
    return vqgan.recipe(variant, dict(kind="autoencoder") | choose_variant(VARIANTS, variant))
