"""MAR (S066, arXiv:2406.11838): continuous latents, any set of them given any other, each by a small diffusion."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.mar import model_config
from configs.recipes import images
from configs.tokenizers import mar_kl

# Their released models: layers of encoder and decoder each, heads, width; depth and width of the head; guidance scale.
SIZES = {
    "b": dict(num_layers=12, num_heads=12, dim=768, head=(6, 1024), guidance_scale=2.9),
    "l": dict(num_layers=16, num_heads=16, dim=1024, head=(8, 1280), guidance_scale=3.0),
    "h": dict(num_layers=20, num_heads=16, dim=1280, head=(12, 1536), guidance_scale=3.2),
}
SMALL = {
    "fashion": dict(num_layers=3, num_heads=4, dim=128, head=(3, 256), guidance_scale=1.5),
    "smoke": dict(num_layers=1, num_heads=4, dim=64, head=(2, 64), guidance_scale=1.5),
}
# Their autoregressive baseline (sec. 4.2): as GPT, causal and row by row. The guidance scale is ours.
CAUSAL = {
    "causal_l": dict(num_layers=32, num_heads=16, dim=1024, head=(3, 1024), guidance_scale=3.0),
    "causal_fashion": dict(num_layers=6, num_heads=4, dim=128, head=(3, 256), guidance_scale=1.5),
    "causal_smoke": dict(num_layers=2, num_heads=4, dim=64, head=(2, 64), guidance_scale=1.5),
}
COPIES = {"fashion": 8, "smoke": 4}  # of the class; the published models have 64
STEPS = {"fashion": (16, 50), "smoke": (8, 10)}  # of a sample, and of the head
VARIANTS = {"base": SIZES["b"], **SIZES, **SMALL, **CAUSAL}


def get_config(variant: str = "base") -> ConfigDict:
    """MAR-B (base), L and H on ImageNet at 256 x 256: 256 latents of 16 numbers, sampled in 256 steps.

    Not as published: no dropout of attention weights, and the head's weights decay like all others.

    `python train.py --config=configs/mar.py:smoke --workdir=DIR`: 40 steps to a loss of 0.357 held out
    (scikit-learn's digits, a token for 2 x 2 pixels; a diffusion has no likelihood).

    `python train.py --config=configs/mar.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/mar_kl; docs/landmarks.md tells how they are made.

    "causal_l" is their autoregressive baseline with the same head: row by row, 256 steps with a cache. "causal_smoke" comes to a
    loss of 0.181 held out in 40 steps.
    """
    size = dict(choose_variant(VARIANTS, variant))
    (depth, width), guidance_scale = size.pop("head"), size.pop("guidance_scale")
    causal, variant = variant in CAUSAL, variant.removeprefix("causal_")
    num_steps, num_sampling_steps = STEPS.get(variant, (256, 100))
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="random", num_steps=num_steps)
    config.condition = dict(kind="class", copies=COPIES.get(variant, 64), guidance_dropout_rate=0.1)
    config.model = model_config(**size)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="diffusion", depth=depth, width=width, num_sampling_steps=num_sampling_steps)
    config.head.noise_schedule = "linear" if variant in SMALL else "cosine"  # see linear_schedule
    config.objective = dict(kind="masked", schedule="truncated_normal", least_masked=0.7)
    config.sampling = dict(temperature=1.0, guidance_scale=guidance_scale, guidance_schedule="linear_mar")
    if causal:
        masked = config.model.to_dict()
        left_out = ("decoder_dim", "decoder_layers", "decoder_mlp_dim", "decoder_mixer")
        config.model = {k: v for k, v in masked.items() if k not in left_out} | dict(kind="decoder")
        config.order, config.objective = dict(kind="raster"), dict(kind="next_token")
        config.condition.copies = 1
    if variant in SMALL:
        images.train_small(config, variant, "mar_kl", dict(kind="patches", patch_size=2))
        if variant == "fashion":
            config.train.update(num_steps=2000, ema_decay=0.998)  # a diffusion learns for longer, and wants an average
        return config
    config.tokenizer = dict(kind="autoencoder") | mar_kl.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=8e-4, b1=0.9, b2=0.95, weight_decay=0.02, clip_norm=3.0)
    config.schedule = dict(kind="constant", warmup_steps=images.epochs(100, 2048))
    images.train_on_imagenet(
        config, 256, images.epochs(400 if causal else 800, 2048), batch_size=2048, ema_decay=0.9999
    )
    return config
