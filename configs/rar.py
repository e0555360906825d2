"""RAR (S045, arXiv:2411.00776): next codes in random orders at first, row by row in the end."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.rar import model_config
from configs.recipes import images
from configs.tokenizers import maskgit_vqgan

# Their table 1: layers, width, hidden width. Then how their released samples were drawn: temperature, guidance, its power.
SIZES = {
    "b": dict(num_layers=24, dim=768, mlp_dim=3072, sampling=(1.0, 16.0, 2.75)),
    "l": dict(num_layers=24, dim=1024, mlp_dim=4096, sampling=(1.02, 15.5, 2.5)),
    "xl": dict(num_layers=32, dim=1280, mlp_dim=5120, sampling=(1.02, 6.9, 1.5)),
    "xxl": dict(num_layers=40, dim=1408, mlp_dim=6144, sampling=(1.02, 8.0, 1.2)),
}
SMALL = {
    "fashion": dict(num_layers=4, dim=128, mlp_dim=512, sampling=(1.0, 1.5, 1.0)),
    "smoke": dict(num_layers=2, dim=64, mlp_dim=256, sampling=(1.0, 1.5, 1.0)),
}
VARIANTS = {"base": SIZES["b"], **SIZES, **SMALL}


def get_config(variant: str = "base") -> ConfigDict:
    """RAR-B (base), L, XL and XXL on ImageNet at 256 x 256: 400 epochs, random orders until the 200th, none from the 300th.

    Not as published: no dropout of attention weights.

    `python train.py --config=configs/rar.py:smoke --workdir=DIR`: 40 steps to 2.82 bits per dimension held out
    (scikit-learn's digits, a token for each pixel).

    `python train.py --config=configs/rar.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    size = dict(choose_variant(VARIANTS, variant))
    temperature, guidance_scale, power = size.pop("sampling")
    small = variant in SMALL
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="raster")
    config.condition = dict(kind="class", start_token=True, guidance_dropout_rate=0.1)
    config.model = model_config(**size, num_heads=4 if small else 16)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical")
    config.objective = dict(kind="permuted", anneal_start=0.5, anneal_end=0.75)
    config.sampling = dict(temperature=temperature, guidance_scale=guidance_scale)
    config.sampling.update(guidance_schedule="cosine", guidance_power=power)
    if small:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        return config
    config.tokenizer = dict(kind="autoencoder") | maskgit_vqgan.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=4e-4, b1=0.9, b2=0.96, weight_decay=0.03, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=62_500, final_scale=0.025)
    images.train_on_imagenet(config, 256, num_steps=250_000, batch_size=2048)
    return config
