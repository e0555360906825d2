"""VAR (S023, arXiv:2404.02905): an image coarse to fine, all codes of a scale at once."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.var import model_config
from configs.recipes import images
from configs.tokenizers import var_vq

SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
# Their section 4.1: depth d has d heads of 64 numbers. Then how the released models were trained: epochs, batch size, peak
# learning rate, and what is left of it at the end.
SIZES = {
    "d16": dict(depth=16, training=(200, 768, 3e-4, 0.1)),
    "d20": dict(depth=20, training=(250, 768, 3e-4, 0.1)),
    "d24": dict(depth=24, training=(350, 768, 2.4e-4, 0.01)),
    "d30": dict(depth=30, training=(350, 1024, 3.2e-4, 0.01)),
    "d36_512": dict(depth=36, training=(350, 768, 2.4e-4, 0.01)),
}
SMALL = {"fashion": (128, 4, 4), "smoke": (64, 2, 4)}
VARIANTS = {"base": SIZES["d16"], **SIZES, "fashion": {}, "smoke": {}}


def get_config(variant: str = "base") -> ConfigDict:
    """VAR-d16 (base), d20, d24 and d30 on ImageNet at 256 x 256, d36 with shared adaLN at 512 x 512.

    Not as published: no stochastic depth, the weight decay stays at 0.05, and images are cropped at their centre.

    `python train.py --config=configs/var.py:smoke --workdir=DIR`: 40 steps to 4.62 bits per dimension held out, a
    bound (scikit-learn's digits as a residual pyramid of 1, 2, 4 and 8 pixels a side).

    `python train.py --config=configs/var.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/var_vq; docs/landmarks.md tells how they are made.
    """
    size = choose_variant(VARIANTS, variant)
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="next_scale")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.head = dict(kind="categorical")
    config.objective = dict(kind="next_token")
    if variant in SMALL:
        config.model = model_config(*SMALL[variant])
        images.train_small(config, variant, "var_vq", dict(kind="residual_pyramid", sides=(1, 2, 4, 8)))
        config.sampling = dict(temperature=1.0, guidance_scale=1.5, guidance_schedule="linear_steps")
        return config
    depth, (num_epochs, batch_size, learning_rate, final_scale) = size["depth"], size["training"]
    large = variant == "d36_512"
    config.model = model_config(64 * depth, depth, depth, shared_adaln=large)
    config.tokenizer = dict(kind="autoencoder") | var_vq.VARIANTS["base"]
    if large:
        config.tokenizer.quantizer.patch_nums = SIDES_512
    num_steps = images.epochs(num_epochs, batch_size)
    config.optimizer = dict(kind="adamw", learning_rate=learning_rate, b2=0.95, weight_decay=0.05, clip_norm=2.0)
    # A fiftieth of the epochs warms up, a twentieth of the others stays at the peak.
    config.schedule = dict(kind="warmup_stable_decay", warmup_steps=num_steps // 50, final_scale=final_scale)
    config.schedule.decay_fraction = 0.95 * 49 / 50
    images.train_on_imagenet(config, 512 if large else 256, num_steps, batch_size)
    config.data.flip = False
    # Their cfg=1.5 adds 1.5 (conditional - unconditional) to the conditional logits, as the last scale is drawn.
    config.sampling = dict(top_k=900, top_p=0.96, guidance_scale=2.5, guidance_schedule="linear_steps")
    return config
