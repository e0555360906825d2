"""Text, one token a byte: tiny_shakespeare where $AR_JAX_DATA has it, else the texts that ship with scikit-learn."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """A decoder of depth 4 and width 128 on windows of 256 bytes; the smoke variant: depth 2, width 32, 64 bytes.

    `python train.py --config=configs/bytes.py:smoke --workdir=DIR`: 40 steps to 5.12 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="softmax", num_heads=4))
