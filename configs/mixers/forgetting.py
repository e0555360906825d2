"""Text by attention that forgets, a gate for each head (Forgetting Transformer, arXiv:2503.02130)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """The bytes' decoder with forget gates in place of rotations.

    `python train.py --config=configs/mixers/forgetting.py:smoke --workdir=DIR`: 40 steps to 5.10 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="softmax", num_heads=4, rope_base=0.0, forget_gate=True))
