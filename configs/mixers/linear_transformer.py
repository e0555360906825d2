"""Text by linear attention (linear transformer, S059, arXiv:2006.16236)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """elu + 1 in post-norm blocks with biases, as published: a matrix for each head is all that is remembered.

    `python train.py --config=configs/mixers/linear_transformer.py:smoke --workdir=DIR`: 40 steps to 5.10 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(
        kind="linear", num_heads=4, feature_map="elu", query_scale=1.0, epsilon=1e-6, qkv_bias=True, out_bias=True
    )
    block = dict(norm="layer", norm_first=False, activation="gelu_exact", gated=False, mlp_bias=True)
    return text.language_model(variant, mixer, **block)
