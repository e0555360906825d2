"""Text by Transformer-XL with Fourier mixing in every other layer (FNetAR, S002, arXiv:2107.10932; FNet, arXiv:2105.03824)."""

from ml_collections import ConfigDict

from configs.recipes import text

# Transformer-XL's layers, post-norm (arXiv:1901.02860, table 1 and its published script for WikiText-103).
XL = dict(norm="layer", norm_epsilon=1e-5, norm_first=False, activation="relu", gated=False, mlp_bias=True)
MEDIUM = dict(num_layers=16, embed_dim=410, mlp_dim=2100, length=600)
VARIANTS = text.VARIANTS | {"medium": MEDIUM}
# Of attention: heads, their width, steps of a segment and of the memory.
SEGMENTS = {"base": (4, None, 64, 64), "smoke": (4, None, 16, 16), "medium": (10, 41, 150, 150)}


def get_config(variant: str = "base") -> ConfigDict:
    """Every other layer has no attention, but transforms 16 bytes of its past; attention remembers the segment before.

    `python train.py --config=configs/mixers/fnet.py:smoke --workdir=DIR`: 40 steps to 4.87 bits per byte held out
    (of tiny_shakespeare).

    A window of text is four segments, which are read at once: each is given the memory that the one before it left, without
    gradient, as when they come one after the other. `medium` is the paper's size; it has words for tokens and 16 samples of
    a past that is not said to be how far apart, here tokens are bytes and samples two apart.
    """
    size = VARIANTS.get(variant)
    config = text.language_model("base" if variant == "medium" else variant, dict(kind="transformer_xl : fnet"), **XL)
    heads, width, segment, memory = SEGMENTS[variant]
    config.model.mixer.transformer_xl = dict(
        num_heads=heads, head_dim=width, segment_length=segment, memory_length=memory
    )
    config.model.mixer.fnet = dict(num_samples=16, stride=2, unitary=True)
    config.model.learned_positions = config.model.target_positions = False
    if variant == "medium":
        config.model.update(num_layers=size["num_layers"], embed_dim=size["embed_dim"], mlp_dim=size["mlp_dim"])
        config.data.length = size["length"]
    return config
