"""MaskGIT's VQGAN (arXiv:2202.04200): 1024 codes, no attention, averages for strides. RAR and TiTok build on its codes."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.tokenizers import vqgan

MASKGIT = dict(style="maskgit", attention=(), quant_kernel_size=0, image_range=(0.0, 1.0))
VARIANTS = {
    "base": MASKGIT | dict(quantizer=dict(kind="vq", vocab_size=1024, channels=256, l2_norm=False)),
    "fashion": vqgan.SMALL | MASKGIT | dict(quantizer=vqgan.CODES | dict(channels=16, l2_norm=False)),
    "smoke": vqgan.TINY
    | MASKGIT
    | dict(quantizer=vqgan.CODES | dict(vocab_size=64, channels=16, l2_norm=False, ema_decay=0.9)),
}


def get_config(variant: str = "base") -> ConfigDict:
    """16 x 16 codes of 256 x 256 images; "fashion": 7 x 7 of Fashion-MNIST; "smoke": 4 x 4 of the digits."""
    return vqgan.recipe(variant, dict(kind="autoencoder") | choose_variant(VARIANTS, variant))
