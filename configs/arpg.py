"""ARPG (S052, arXiv:2503.10568): random sets of codes in parallel; queries ask, what is known is cached."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.arpg import model_config
from configs.recipes import images
from configs.tokenizers import vqgan

# Their released models: layers (of both passes), heads, width. Then the guidance scale of their samples.
SIZES = {
    "l": dict(num_layers=24, num_heads=16, dim=1024, guidance_scale=5.0),
    "xl": dict(num_layers=36, num_heads=20, dim=1280, guidance_scale=6.0),
    "xxl": dict(num_layers=48, num_heads=24, dim=1536, guidance_scale=7.5),
}
SMALL = {
    "fashion": dict(num_layers=6, num_heads=4, dim=128, guidance_scale=2.0, num_steps=16),
    "smoke": dict(num_layers=2, num_heads=4, dim=64, guidance_scale=2.0, num_steps=16),
}
VARIANTS = {"base": SIZES["l"], **SIZES, **SMALL}


def get_config(variant: str = "base") -> ConfigDict:
    """ARPG-L (base), XL and XXL on ImageNet at 256 x 256: trained code by code, sampled in 64 steps of growing size.

    `python train.py --config=configs/arpg.py:smoke --workdir=DIR`: 40 steps to 2.93 bits per dimension held out
    (scikit-learn's digits, a token for each pixel; sampled in 16 steps).

    `python train.py --config=configs/arpg.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    size = dict(choose_variant(VARIANTS, variant))
    guidance_scale, num_steps = size.pop("guidance_scale"), size.pop("num_steps", 64)
    small = variant in SMALL
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="random")
    config.feed = dict(kind="query")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = model_config(**size, multiple_of=32 if small else 256)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False)
    config.objective = dict(kind="next_token")
    config.sampling = dict(temperature=1.0, guidance_scale=guidance_scale, guidance_schedule="linear")
    config.sampling.order = dict(kind="random", num_steps=num_steps, sizes="arccos")
    if small:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        return config
    config.tokenizer = dict(kind="autoencoder") | vqgan.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=4e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=images.epochs(100, 1024), final_scale=0.025)
    images.train_on_imagenet(config, 256, images.epochs(400, 1024), batch_size=1024)
    return config
