"""MaskGIT (arXiv:2202.04200): all codes at once, the surest are kept; as TiTok's generators."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.maskgit import model_config
from configs.recipes import images
from configs.tokenizers import titok

BERT = dict(kind="bert", dim=768, num_layers=24, num_heads=16, mlp_dim=3072)
U_VIT = dict(kind="u_vit", dim=1024, num_layers=20, num_heads=16, mlp_dim=4096)
# TiTok's generators (arXiv:2406.07550) by their tokenizers, and how its authors sample: steps, temperature, guidance as ours.
TITOK = {
    "titok_l_32": (BERT, "base", (8, 9.5), dict(guidance_scale=1 + 4.5, guidance_schedule="linear_before")),
    "titok_b_64": (BERT, "b_64", (8, 11.0), dict(guidance_scale=1 + 3.0, guidance_schedule="linear_before")),
    "titok_s_128": (
        U_VIT, "s_128", (64, 2.8), dict(guidance_scale=6.9, guidance_schedule="cosine", guidance_power=3.0)
    ),
}  # fmt: skip
SMALL = {
    "fashion": BERT | dict(dim=128, num_layers=4, num_heads=4, mlp_dim=512),
    "smoke": BERT | dict(dim=64, num_layers=2, num_heads=4, mlp_dim=256),
}
VARIANTS = {"base": TITOK["titok_l_32"], **TITOK, **SMALL}


def get_config(variant: str = "base") -> ConfigDict:
    """The generators of TiTok-L-32 (base), B-64 and S-128, on ImageNet at 256 x 256.

    Not as published: no dropout of attention weights.

    `python train.py --config=configs/maskgit.py:smoke --workdir=DIR`: 40 steps to 2.61 bits per dimension held out
    (scikit-learn's digits, a token for each pixel).

    `python train.py --config=configs/maskgit.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    size = choose_variant(VARIANTS, variant)
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="random")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.head = dict(kind="categorical")
    config.objective = dict(kind="masked", schedule="arccos", known_weight=0.1, label_smoothing=0.1)
    config.sampling = dict(order=dict(kind="random", num_steps=8, sizes="arccos", adaptive=True))
    if variant in SMALL:
        config.model = model_config(**size)
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        config.sampling.update(temperature=2.0, temperature_schedule="linear", guidance_scale=1.5)
        return config
    network, tokenizer, (num_steps, temperature), guidance = size
    config.model = model_config(**network)
    config.model.dropout_rate = 0.1
    config.tokenizer = dict(kind="titok") | titok.VARIANTS[tokenizer]
    config.optimizer = dict(kind="adamw", learning_rate=2e-4, b1=0.9, b2=0.96, weight_decay=0.03, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=10_000, final_scale=0.05)
    images.train_on_imagenet(config, 256, num_steps=500_000, batch_size=2048, ema_decay=0.999)
    config.sampling.order.num_steps = num_steps
    config.sampling.update(temperature=temperature, temperature_schedule="annealed", **guidance)
    return config
