"""M-VAR (S005, arXiv:2411.10433): VAR with attention within a scale only, and Mamba-2 from scale to scale."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.mvar import model_config
from configs import var
from configs.recipes import images
from configs.tokenizers import var_vq

# Depth d has d heads of 64 numbers. Then how they are trained: epochs, batch size, peak learning rate, and what is left of it
# at the end. The smaller ones are without the norm of queries and keys.
SIZES = {
    "d12": dict(depth=12, l2_norm=False, training=(200, 768, 3e-4, 0.1)),
    "d16": dict(depth=16, l2_norm=False, training=(200, 768, 3e-4, 0.1)),
    "d20": dict(depth=20, l2_norm=False, training=(250, 768, 3e-4, 0.1)),
    "d24": dict(depth=24, training=(350, 768, 2.4e-4, 0.01)),
    "d32": dict(depth=32, training=(350, 1024, 3.2e-4, 0.01)),
}
SMALL = {
    "fashion": dict(dim=128, depth=3, num_heads=4, head_dim=32),
    "smoke": dict(dim=64, depth=2, num_heads=4, head_dim=32),
}
VARIANTS = {"base": SIZES["d16"], **SIZES, **SMALL}


def get_config(variant: str = "base") -> ConfigDict:
    """M-VAR-d12, d16 (base), d20, d24 and d32 on ImageNet at 256 x 256, trained as VAR is (see configs/var.py), with its tokenizer.

    No cache of keys and values grows with the scales: what a scale costs depends on its own size alone.

    `python train.py --config=configs/mvar.py:smoke --workdir=DIR`: 40 steps to 4.48 bits per dimension held out, a
    bound (scikit-learn's digits as a residual pyramid of 1, 2, 4 and 8 pixels a side).

    `python train.py --config=configs/mvar.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/var_vq; docs/landmarks.md tells how they are made.
    """
    size = dict(choose_variant(VARIANTS, variant))
    config = var.get_config(variant if variant in SMALL else "d16")
    if variant in SMALL:
        config.model = model_config(**size, state_dim=16)
        return config
    depth, (num_epochs, batch_size, learning_rate, final_scale) = size["depth"], size["training"]
    config.model = model_config(64 * depth, depth, depth, l2_norm=size.get("l2_norm", True))
    config.tokenizer = dict(kind="autoencoder") | var_vq.VARIANTS["base"]
    num_steps = images.epochs(num_epochs, batch_size)
    config.optimizer.learning_rate = learning_rate
    config.schedule.update(warmup_steps=num_steps // 50, final_scale=final_scale)
    images.train_on_imagenet(config, 256, num_steps, batch_size)
    config.data.flip = False
    return config
