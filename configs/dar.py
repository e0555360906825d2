"""DAR (S196, arXiv:2503.11129): codes in a zigzag of diagonals, each told where it stands and where the next one goes."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.llamagen import model_config
from configs.llamagen import SIZES as LLAMA_SIZES
from configs.llamagen import SMALL
from configs.recipes import images

SIZES = {"b": LLAMA_SIZES["l"], "l": LLAMA_SIZES["xl"], "xl": LLAMA_SIZES["xxl"]}
VARIANTS = {"base": "b", **{name: name for name in (*SIZES, *SMALL)}}
# taming-transformers' VQGAN (arXiv:2012.09841) with 16384 codes of 256 numbers.
TOKENIZER = dict(quantizer=dict(kind="vq", vocab_size=16384, channels=256, l2_norm=False), z_channels=256)


def get_config(variant: str = "base") -> ConfigDict:
    """DAR-B (base), L and XL on ImageNet at 256 x 256, from 485M to 2.0B parameters.

    The paper's code and weights were not at hand: layers and widths are LlamaGen's, which come to 484M, 1.1B and 2.1B with
    the modulation and the codebook; scale and power of the guidance and the training are like RAR's.

    `python train.py --config=configs/dar.py:smoke --workdir=DIR`: 40 steps to 2.70 bits per dimension held out
    (scikit-learn's digits, a token for each pixel, whose vector is its grey level).

    `python train.py --config=configs/dar.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    name = choose_variant(VARIANTS, variant)
    small = name in SMALL
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="diagonal", zigzag=True)
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = model_config(**(SIZES | SMALL)[name], multiple_of=32 if small else 256)
    config.model.update(adaln="block", target_axes=True, direction_modulation=True, codebook_inputs=True)
    config.model.mixer.prefix_rotation = "identity"
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False)
    config.objective = dict(kind="next_token")
    config.sampling = dict(temperature=1.0, guidance_scale=1.5 if small else 6.9)
    config.sampling.update(guidance_schedule="cosine", guidance_power=1.5)
    if small:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        return config
    config.tokenizer = dict(kind="autoencoder") | TOKENIZER
    config.optimizer = dict(kind="adamw", learning_rate=4e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=62_500, final_scale=0.025)
    images.train_on_imagenet(config, 256, num_steps=250_000, batch_size=2048)
    return config
