"""Text by dynamic convolutions: filters of 15 bytes that come from the byte that reads (S121, arXiv:1901.10430)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """The bytes' decoder with the mixer changed; `config.model.mixer.dynamic = False` has lightweight convolutions.

    `python train.py --config=configs/mixers/lightweight_convolution.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte
    held out (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="lightweight_convolution", num_heads=4, width=15, dynamic=True))
