"""Continuous latents with a Gaussian posterior: the KL-16 autoencoder that MAR generates with (arXiv:2406.11838)."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.tokenizers import vqgan

# MAR multiplies the latents by 0.2325 (its section 4.1 uses LDM's KL-16), which brings them to a unit variance.
VARIANTS = {
    "base": dict(attention=("encoder", "middle"), quantizer=dict(kind="kl", channels=16), latent_scale=0.2325),
    "fashion": vqgan.SMALL | dict(quantizer=dict(kind="kl", channels=4, kl_weight=1e-4), latent_scale=1.2),
    "smoke": vqgan.TINY | dict(quantizer=dict(kind="kl", channels=4, kl_weight=1e-4)),
}


def get_config(variant: str = "base") -> ConfigDict:
    """MAR's autoencoder of 256 x 256 images; "fashion": 7 x 7 x 4 numbers of Fashion-MNIST; "smoke": 4 x 4 x 4 of the digits."""
    return vqgan.recipe(variant, dict(kind="autoencoder") | choose_variant(VARIANTS, variant))
