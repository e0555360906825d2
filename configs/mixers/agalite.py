"""Text by gated linear transformers with a memory of a few vectors (AGaLiTe, S050, arXiv:2310.15719)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Blocks with gates for residuals, as published for agents: a step costs the same however long an episode is.

    `python train.py --config=configs/mixers/agalite.py:smoke --workdir=DIR`: 40 steps to 5.08 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="agalite", num_heads=4, expansion=4, num_waves=2)
    block = dict(norm="layer", residual="gru", activation="relu", gated=False, mlp_bias=True)
    return text.language_model(variant, mixer, **block)
