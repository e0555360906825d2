"""Multi-scale codes by residual quantization, coarse to fine (VAR's tokenizer, arXiv:2404.02905, section 3.2)."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.tokenizers import vqgan

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SMALL = dict(kind="multi_scale_vq", channels=16, ema_decay=0.95, revive_below=0.1)
VARIANTS = {
    "base": dict(
        hidden_channels=160,
        quant_kernel_size=3,
        quantizer=dict(kind="multi_scale_vq", vocab_size=4096, channels=32, patch_nums=SIDES, num_phi=4),
    ),
    "fashion": vqgan.SMALL | dict(quantizer=SMALL | dict(vocab_size=256, patch_nums=(1, 2, 3, 5, 7), num_phi=4)),
    "smoke": vqgan.TINY | dict(quantizer=SMALL | dict(vocab_size=64, patch_nums=(1, 2, 4), num_phi=2)),
}


def get_config(variant: str = "base") -> ConfigDict:
    """VAR's tokenizer, 680 codes an image; "fashion": scales of 1 to 7 of Fashion-MNIST; "smoke": 1, 2, 4 of the digits."""
    return vqgan.recipe(variant, dict(kind="autoencoder") | choose_variant(VARIANTS, variant))
