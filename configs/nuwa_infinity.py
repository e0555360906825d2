"""NUWA-Infinity (S104, arXiv:2207.09814): patch after patch in any direction, each from the patches around it; any size."""

import itertools

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.recipes import images

VARIANTS = {
    "base": dict(embed_dim=1024, num_layers=24, num_heads=16, patch=8),
    "video": dict(embed_dim=1024, num_layers=24, num_heads=16, patch=(1, 8, 8)),
    "smoke": dict(embed_dim=64, num_layers=2, num_heads=4, patch=4),
    "smoke_video": dict(embed_dim=64, num_layers=2, num_heads=4, patch=(1, 5, 5)),
}


def get_config(variant: str = "base") -> ConfigDict:
    """Images of 32 x 32 codes (base) and videos, from shards in runs/shards; samples may be of any size.

    Each example is trained in one of the eight scans of its patches: rows or columns first, from either end of each axis.
    Not as published: what the networks read of other patches is their cache at all layers; no text; sizes and training are ours.

    `python train.py --config=configs/nuwa_infinity.py:smoke --workdir=DIR`: 60 steps to 0.60 bits per dimension held out
    (crops of scikit-learn's two photographs, 12 x 12 pixels of 8 grey levels in patches of 4 x 4), and eval.py tells the
    same of pictures of 20 x 28: 0.59 bits.
    """
    size = choose_variant(VARIANTS, variant)
    small, video = variant.startswith("smoke"), "video" in variant
    config = ConfigDict()
    config.seed = 0
    # A video goes from frame to frame; which way it goes inside a patch of frames is drawn.
    axes = (1, 2) if video else (0, 1)
    flips = [flip for n in range(3) for flip in itertools.combinations(axes, n)]
    scans = [dict(kind="raster")] if video else [dict(kind="raster"), dict(kind="column")]
    orders = [dict(kind="patches", patch=size["patch"], over=scan, flip=flip) for scan in scans for flip in flips]
    config.order = dict(kind="one_of", orders=orders)
    config.feed = dict(kind="nearby", extent=1)
    config.model = dict(kind="decoder", embed_dim=size["embed_dim"], num_layers=size["num_layers"])
    config.model.update(learned_positions=False, target_positions=False, dropout_rate=0.1)
    config.model.mixer = dict(kind="softmax", num_heads=size["num_heads"])
    config.head = dict(kind="categorical")
    config.objective = dict(kind="next_token")
    config.sampling = dict(temperature=1.0, order=orders[0])
    if small:
        config.condition = dict(kind="class", guidance_dropout_rate=0.1)
        images.train_small(config, "smoke", "", dict(kind="pixels", levels=8))
        config.train.update(num_steps=60, batch_size=32)
        config.data = dict(kind="crops", height=12, width=12, shrink=2)
        config.eval.update(batch_size=64, data=dict(height=20, width=28))
        if video:
            config.tokenizer = dict(kind="pixels")
            config.data = dict(kind="moving_digits", num_frames=4, side=10)
            config.eval.data = dict(num_frames=6, side=15)
        return config
    config.condition = dict(kind="none")
    config.data = dict(kind="token_shards", path=f"{images.SHARDS}/{'pexels' if video else 'lhq'}")
    config.tokenizer = dict(kind="codes", grids=((5, 16, 16),) if video else ((32, 32),), vocab_size=16384)
    config.optimizer = dict(kind="adamw", learning_rate=1e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=5000)
    config.train = dict(num_steps=500_000, batch_size=256, log_every_steps=100)
    config.checkpoint = dict(every_steps=5000)
    config.eval = dict(batch_size=50)
    config.mesh = dict(fsdp=-1)
    config.model.update(dtype="bfloat16", remat="full")
    return config
