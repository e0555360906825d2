"""Attention that a lexicon's entries condition (S044, arXiv:1906.03674), as a classifier of texts: which language is it?"""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.data.files import resolve
from configs.recipes.classifiers import recipe
from configs.recipes.text import descriptions

MULTI30K = ("multi30k_en_de/val.en.gz", "multi30k_en_de/val.de.gz")
VARIANTS = {
    "base": dict(embed_dim=300, rnn_dim=300, bidirectional=True, embed_noise=0.1, embed_dropout_rate=0.2),
    "smoke": dict(embed_dim=32, rnn_dim=32),
}
TRAINING = {"base": (2000, 100, 64, 1e-3), "smoke": (150, 15, 64, 5e-3)}


def get_config(variant: str = "base") -> ConfigDict:
    """English or German, from 32 bytes of Multi30k where $AR_JAX_DATA has it; else which of scikit-learn's descriptions.

    `python train.py --config=configs/classifiers/conditioned_attention.py:smoke --workdir=DIR`: 150 steps to
    98 % of Multi30k's held-out windows.
    """
    size = choose_variant(VARIANTS, variant)
    files = MULTI30K if all(resolve(file).is_file() for file in MULTI30K) else tuple(descriptions())
    data = dict(kind="text", path=files, length=32, label_files=True)
    return recipe(variant, dict(kind="conditioned_attention") | size, data, TRAINING[variant])
