"""Text by Mamba (arXiv:2312.00752): selective state spaces, of constant size whatever the length."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Decoder blocks whose mixer is Mamba's; no positions are needed: the state knows what came when.

    `python train.py --config=configs/mixers/mamba.py:smoke --workdir=DIR`: 40 steps to 5.02 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="mamba"), learned_positions=False, target_positions=False)
