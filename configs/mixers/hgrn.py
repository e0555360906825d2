"""Text by gated recurrences with a floor under their forget gates (HGRN, arXiv:2311.04823; HGRN2, arXiv:2404.07904)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """HGRN below, HGRN2 above: the same gates, once over single numbers, once over matrices whose keys are what is forgotten.

    `python train.py --config=configs/mixers/hgrn.py:smoke --workdir=DIR`: 40 steps to 5.10 bits per byte held out
    (of scikit-learn's texts).
    """
    matrices = dict(num_heads=4, feature_map="silu", decay="channel", decay_rank=0, decay_divisor=1.0, decay_floor=0.5)
    matrices |= dict(tied_keys=True, normalize=False, norm_heads=False, norm_epsilon=1e-5)
    mixer = dict(kind="hgrn : linear", hgrn=dict(decay_floor=0.0), linear=matrices)
    return text.language_model(variant, mixer)
