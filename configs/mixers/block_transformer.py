"""Text by a decoder over blocks of bytes and one inside the block (Block Transformer, S148, arXiv:2406.02657)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Blocks of 4 bytes; half of the layers read blocks, the other half the bytes of one block and two of its context.

    `python train.py --config=configs/mixers/block_transformer.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    config = text.language_model(
        variant, dict(kind="softmax", num_heads=4), learned_positions=False, target_positions=False
    )
    half = config.model.num_layers // 2
    config.model.update(kind="block_transformer", num_layers=half, decoder_layers=half, block_length=4)
    config.feed = dict(kind="shift")
    return config
