"""DnD-Transformer (S171, arXiv:2410.01912): several codes for each place, each drawn between layers that then read it."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.dnd_transformer import model_config
from configs.recipes import images
from configs.tokenizers import rq_vae

# Their networks, and the layers (from 0) behind which a code is drawn. Then the guidance scale of their samples.
XXL, XXXL = dict(num_heads=24, dim=1536), dict(num_heads=32, dim=2048)
EIGHT = (26, 29, 32, 35, 38, 41, 44, 47)
SIZES = {
    "xxl": XXL | dict(positions=(39, 47)),
    "xxxl": XXXL | dict(positions=(39, 47)),
    "arxiv_xxl": XXL | dict(positions=EIGHT),
    "text_xxl": XXL | dict(positions=(47,)),
}
GUIDANCE = {"xxl": 2.0, "xxxl": 1.7}
TOKENIZERS = {"arxiv_xxl": "depth_8", "text_xxl": "text"}
SMALL = {
    "fashion": dict(num_heads=4, dim=128, positions=(2, 3)),
    "smoke": dict(num_heads=4, dim=64, positions=(1, 2)),
}
VARIANTS = {"base": "xxl", **{name: name for name in (*SIZES, *SMALL)}}


def get_config(variant: str = "base") -> ConfigDict:
    """DnD-Transformer-XXL (base) and XXXL on ImageNet at 256 x 256: 16 x 16 places of two codes in 256 network evaluations.

    "arxiv_xxl" has eight codes a place and "text_xxl" 24 x 24 places of one, both without classes. They are for the official
    weights: no data set here has images of pages or of text. Epochs and batch size are LlamaGen's; the authors' own are
    not told.

    `python train.py --config=configs/dnd_transformer.py:smoke --workdir=DIR`: 40 steps to 2.59 bits per dimension held out
    (scikit-learn's digits, each grey level written with two digits to base 5; 64 network evaluations an image).

    `python train.py --config=configs/dnd_transformer.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/rq_vae, made as docs/landmarks.md tells for others.
    """
    name = choose_variant(VARIANTS, variant)
    size, small = (SIZES | SMALL)[name], name in SMALL
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="raster")
    config.feed = dict(kind="merge")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1) if small or name in GUIDANCE else dict(kind="none")
    config.model = model_config(**size, multiple_of=32 if small else 256)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False, num_outputs=len(size["positions"]))
    config.objective = dict(kind="next_token")
    if small:
        images.train_small(config, variant, "rq_vae", dict(kind="pixels", depth=2))
        config.sampling = dict(temperature=1.0, guidance_scale=1.5)
        return config
    config.tokenizer = dict(kind="autoencoder") | rq_vae.VARIANTS[TOKENIZERS.get(name, "base")]
    config.optimizer = dict(kind="adamw", learning_rate=2e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="constant")
    image_size = 384 if name == "text_xxl" else 256
    images.train_on_imagenet(config, image_size, images.epochs(300, 256), batch_size=256, ema_decay=0.9999)
    sampling = dict(temperature=1.0, guidance_scale=GUIDANCE[name]) if name in GUIDANCE else dict(temperature=0.1)
    config.sampling = sampling
    return config
