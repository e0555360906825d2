"""Text by full attention that is factorised: blocks nearby, abstractions of others (Combiner, S062, arXiv:2107.05768)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Blocks of 8 bytes; `config.model.mixer.factorization` may be "logsparse" or "axial", too.

    `python train.py --config=configs/mixers/combiner.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="combiner", num_heads=4, factorization="fixed", width=8))
