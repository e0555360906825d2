"""LlamaGen (arXiv:2406.06525): Llama predicts the next code of an image, row by row."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.llamagen import model_config
from configs.recipes import images
from configs.tokenizers import vqgan

# Their table 1: layers, heads, width. Then the guidance scale of their released samples.
SIZES = {
    "b": dict(num_layers=12, num_heads=12, dim=768),
    "l": dict(num_layers=24, num_heads=16, dim=1024),
    "xl": dict(num_layers=36, num_heads=20, dim=1280),
    "xxl": dict(num_layers=48, num_heads=24, dim=1536),
    "3b": dict(num_layers=24, num_heads=32, dim=3200),
}
GUIDANCE = {"b": 2.0, "l": 2.0, "xl": 1.75, "xxl": 1.75, "3b": 1.65}
SMALL = {
    "fashion": dict(num_layers=4, num_heads=4, dim=128),
    "smoke": dict(num_layers=2, num_heads=4, dim=64),
}
# Where codes cover 16 x 16 pixels, an image of 256 pixels a side is 16 x 16 codes, one of 384 is 24 x 24.
CLASSES = {f"{name}_{side}": (name, side) for side in (256, 384) for name in SIZES}
CAPTIONS = {f"t2i_{name}": (name, 256) for name in SIZES} | {"t2i_xl_512": ("xl", 512)}
VARIANTS = {"base": ("b", 384), **CLASSES, **CAPTIONS, "fashion": ("fashion", 28), "smoke": ("smoke", 8)}


def get_config(variant: str = "base") -> ConfigDict:
    """LlamaGen-B, L, XL, XXL and 3B on ImageNet: "b_256" to "3b_384"; base is "b_384".

    The variants "t2i_..." read 120 vectors of 2048 numbers of a caption (FLAN-T5 XL's) in place of a class. They are for
    the official weights: no data set here has such vectors.

    `python train.py --config=configs/llamagen.py:smoke --workdir=DIR`: 40 steps to 2.55 bits per dimension held out
    (scikit-learn's digits, a token for each pixel).

    `python train.py --config=configs/llamagen.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan, 800 steps to 3.42 bits per token held out; docs/landmarks.md tells how they are made.
    """
    name, image_size = choose_variant(VARIANTS, variant)
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="raster")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = model_config(**(SIZES | SMALL)[name], multiple_of=32 if name in SMALL else 256)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False)
    config.objective = dict(kind="next_token")
    if name in SMALL:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        config.sampling = dict(temperature=1.0, guidance_scale=1.5)
        return config
    config.tokenizer = dict(kind="autoencoder") | vqgan.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=1e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="constant")
    images.train_on_imagenet(config, image_size, images.epochs(300, 256), batch_size=256)
    config.sampling = dict(temperature=1.0, guidance_scale=GUIDANCE[name])
    if variant in CAPTIONS:
        caption = dict(num_tokens=120, channels=2048, projection="mlp")
        config.condition = dict(kind="embedding", guidance_dropout_rate=0.1) | caption
        config.sampling = dict(temperature=1.0, guidance_scale=7.5, top_k=1000)
    return config
