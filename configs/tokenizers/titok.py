"""An image as a short line of codes, read and written by transformers (TiTok, arXiv:2406.07550)."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.tokenizers import vqgan

SIZES = {  # their table 1: S, B and L
    "small": dict(embed_dim=512, num_layers=8, num_heads=8),
    "base": dict(embed_dim=768, num_layers=12, num_heads=12),
    "large": dict(embed_dim=1024, num_layers=24, num_heads=16),
}
CODES = dict(kind="vq", vocab_size=4096, channels=12, l2_norm=True)


def published(size: str, num_latent_tokens: int) -> dict:
    """One of the paper's models, with the decoder of MaskGIT's VQGAN behind it."""
    sizes = dict(encoder=SIZES[size], decoder=SIZES[size], pixel_decoder=dict())
    return sizes | dict(num_latent_tokens=num_latent_tokens, patch_size=16, quantizer=CODES)


def pixels(embed_dim: int, num_layers: int, patch_size: int, num_latent_tokens: int) -> dict:
    """A small model that paints pixels by itself."""
    size = dict(embed_dim=embed_dim, num_layers=num_layers, num_heads=4)
    sizes = dict(encoder=size, decoder=size, patch_size=patch_size, num_latent_tokens=num_latent_tokens)
    return sizes | dict(image_range=(-1.0, 1.0), quantizer=vqgan.CODES)


VARIANTS = {
    "base": published("large", 32),  # L-32
    "b_64": published("base", 64),
    "s_128": published("small", 128),
    "fashion": pixels(embed_dim=96, num_layers=2, patch_size=7, num_latent_tokens=16),
    "smoke": pixels(embed_dim=32, num_layers=1, patch_size=2, num_latent_tokens=8),
}


def get_config(variant: str = "base") -> ConfigDict:
    """32 codes of a 256 x 256 image; "fashion": 16 codes of Fashion-MNIST; "smoke": 8 codes of the digits.

    The paper first trains towards another tokenizer's codes (L-32, B-64, S-128 start there); here pixels train all.
    """
    config = vqgan.recipe(variant, dict(kind="titok") | choose_variant(VARIANTS, variant))
    if variant == "fashion":
        config.train.num_steps, config.optimizer.learning_rate = 1200, 2e-3
    return config
