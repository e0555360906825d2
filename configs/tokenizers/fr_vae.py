"""Codes of frequency bands, low to high, by residual quantization (FR-VAE of NFIG, S034, arXiv:2503.07076, section 3.1)."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.tokenizers import var_vq, vqgan

BANDS = dict(frequency_bands=True)
VARIANTS = {
    name: tokenizer | dict(quantizer=tokenizer["quantizer"] | BANDS) for name, tokenizer in var_vq.VARIANTS.items()
}


def get_config(variant: str = "base") -> ConfigDict:
    """680 codes of ten bands; "fashion": five bands of Fashion-MNIST; "smoke": three of the digits.

    Not as published: the authors start the encoder from DINOv2 and have a discriminator on DINO's features; here both are
    VAR's.
    """
    return vqgan.recipe(variant, dict(kind="autoencoder") | choose_variant(VARIANTS, variant))
