"""MaskGIL (S033, arXiv:2507.13032): LlamaGen's network reads all codes at once, and fills in the unknown ones in 8 steps."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop import llamagen as official
from ar_jax.interop.maskgil import as_published
from configs import llamagen
from configs.recipes import images
from configs.tokenizers import vqgan

SIZES = {name: llamagen.SIZES[name] for name in ("b", "l", "xl", "xxl")}
SMALL = llamagen.SMALL
VARIANTS = {"base": "b", **{name: name for name in (*SIZES, *SMALL)}}


def get_config(variant: str = "base") -> ConfigDict:
    """MaskGIL-B (base), L, XL and XXL on ImageNet at 256 x 256.

    These are as in the authors' code, whose weights they fit: rotations count along a line (the paper's are on two axes), off
    by one place, and the mask is a code that may be drawn. The small variants rotate on two axes and draw codes only.

    `python train.py --config=configs/maskgil.py:smoke --workdir=DIR`: 40 steps to 2.71 bits per dimension held out
    (scikit-learn's digits, a token for each pixel).

    `python train.py --config=configs/maskgil.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    name = choose_variant(VARIANTS, variant)
    small = name in SMALL
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="random")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    model = official.model_config(**(SIZES | SMALL)[name], multiple_of=32 if small else 256)
    config.model = model if small else as_published(model)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False, confidence="log_probability")
    config.objective = dict(kind="masked", schedule="arccos", known_weight=1.0, label_smoothing=0.1)
    config.sampling = dict(temperature=1.0, confidence_temperature=4.5, temperature_schedule="linear_steps")
    config.sampling.update(guidance_scale=1.5 if small else 4.0, guidance_schedule="linear_steps")
    config.sampling.order = dict(kind="random", num_steps=8, sizes="cosine_shares", adaptive=True)
    if small:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        return config
    config.tokenizer = dict(kind="autoencoder") | vqgan.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=1e-4, b1=0.9, b2=0.96, weight_decay=1e-5, clip_norm=1.0)
    config.schedule = dict(kind="constant")
    images.train_on_imagenet(config, 256, images.epochs(300, 256), batch_size=256)
    return config
