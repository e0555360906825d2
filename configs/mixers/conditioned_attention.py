"""Text by an LSTM with attention that a lexicon of bytes conditions (conditioned attention, S044, arXiv:1906.03674)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """What each byte is (a letter, a vowel, a digit, the end of a sentence) gates how much it is attended to.

    `python train.py --config=configs/mixers/conditioned_attention.py:smoke --workdir=DIR`: 40 steps to 5.06 bits per byte
    held out (of scikit-learn's texts).
    """
    mixer = dict(kind="conditioned_attention", conditioning="gate")
    return text.language_model(variant, mixer, learned_positions=False, target_positions=False, lexicon="byte_classes")
