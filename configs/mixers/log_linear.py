"""Text by log-linear attention: a memory for each power of two of the past (log-linear Mamba-2, arXiv:2506.04761)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Mamba-2 with twelve levels, which serve 2048 bytes.

    `python train.py --config=configs/mixers/log_linear.py:smoke --workdir=DIR`: 40 steps to 4.99 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="mamba2", state_dim=32, head_dim=16, num_levels=12)
    return text.language_model(variant, mixer, learned_positions=False, target_positions=False)
