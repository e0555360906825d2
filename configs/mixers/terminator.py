"""Text by hyper-kernels that are gated by what they convolve, without residuals (Terminator, S043, arXiv:2401.17948)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Blocks of slow nets and convolutions, one behind the other; nothing is added to what a block reads.

    `python train.py --config=configs/mixers/terminator.py:smoke --workdir=DIR`: 40 steps to 5.08 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="hyper_zzw", local_widths=(3, 5, 7, 9))
    config = text.language_model(variant, mixer, learned_positions=False, target_positions=False)
    config.model.update(residual="none", mlps="none", norm="layer", dropout_rate=0.0)
    return config
