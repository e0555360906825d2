"""Several codes for each place by residual quantization (RQ-VAE, arXiv:2203.01941), as DnD-Transformer has them."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.tokenizers import vqgan

PUBLISHED = dict(z_channels=256)
SMALL = dict(kind="residual_vq", channels=16, depth=2, ema_decay=0.95, revive_below=0.1)


def codes(depth: int, vocab_size: int = 16384) -> dict:
    """So many codes for 16 x 16 pixels."""
    return PUBLISHED | dict(quantizer=dict(kind="residual_vq", vocab_size=vocab_size, channels=256, depth=depth))


VARIANTS = {
    "base": codes(2),
    "depth_4": codes(4),
    "depth_8": codes(8),
    "text": codes(1, vocab_size=4096),
    "fashion": vqgan.SMALL | dict(quantizer=SMALL | dict(vocab_size=256)),
    "smoke": vqgan.TINY | dict(quantizer=SMALL | dict(vocab_size=64)),
}


def get_config(variant: str = "base") -> ConfigDict:
    """16 x 16 x 2 codes of 256 x 256 images, or 4 and 8 for each place; "text": one of 4096.

    "fashion": 7 x 7 x 2 codes of Fashion-MNIST; "smoke": 4 x 4 x 2 of the digits. The published sizes of the layers are
    RQ-VAE's: those of DnD-Transformer's own tokenizers are not in its code.
    """
    return vqgan.recipe(variant, dict(kind="autoencoder") | choose_variant(VARIANTS, variant))
