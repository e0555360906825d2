"""NAR (S016, arXiv:2503.10696) on videos: from a corner outwards, each code from its neighbours in space and time."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.nar import video_model_config
from configs.recipes import images

# Their code's "llama-abs-B", L (which they trained), LP and XL, with a layer, a norm and a head more for each further axis.
SIZES = {
    "b": dict(num_layers=12, num_heads=12, dim=768),
    "l": dict(num_layers=24, num_heads=16, dim=1024),
    "lp": dict(num_layers=30, num_heads=20, dim=1280),
    "xl": dict(num_layers=36, num_heads=20, dim=1280),
}
SMALL = dict(num_layers=2, num_heads=4, dim=64)
CLIPS = ("video_clips/carphone_pristine.mp4", "video_clips/bikes.mp4")
VARIANTS = {"base": "l", **{name: name for name in SIZES}, "clips": "clips", "smoke": "smoke"}


def get_config(variant: str = "base") -> ConfigDict:
    """NAR-L (base), B, LP and XL on UCF-101: 34 steps a video of 4 x 16 x 16 codes, 16 frames of 128 x 128 pixels.

    The codes are those of LARP's tokenizer, which is not here: `config.data.path` names shards of them.

    `python train.py --config=configs/nar_video.py:smoke --workdir=DIR`: 40 steps to 1.98 bits per dimension held out
    (scikit-learn's digits on the move, 3 frames of 9 x 9, a token for each pixel; 19 steps a video).

    The variant "clips" is the same on crops of two real videos, 40 steps to 1.91 bits of 17 levels, where $AR_JAX_DATA has them;
    reading them needs imageio[ffmpeg].
    """
    name = choose_variant(VARIANTS, variant)
    small = variant in ("clips", "smoke")
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="nearest")
    config.feed = dict(kind="neighbors")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = video_model_config(**(SMALL if small else SIZES[name]), multiple_of=32 if small else 256)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False)
    config.objective = dict(kind="next_token")
    config.sampling = dict(temperature=1.0, guidance_scale=1.5 if small else 2.5)
    if small:
        images.train_small(config, "smoke", "", dict(kind="pixels"))
        config.data = dict(kind="moving_digits", num_frames=3, side=9)
        config.train.batch_size = 32
        if variant == "clips":
            config.data = dict(kind="crops", path=CLIPS, num_frames=3, height=9, width=9, shrink=8)
            config.tokenizer.levels = 17
        return config
    config.data = dict(kind="token_shards", path=f"{images.SHARDS}/larp")
    config.tokenizer = dict(kind="codes", grids=((4, 16, 16),), vocab_size=8192)
    config.optimizer = dict(kind="adamw", learning_rate=6e-4, b1=0.9, b2=0.95, weight_decay=0.05)
    num_videos, batch_size, num_epochs, warmup_epochs = 9537, 32, 1000, 4
    config.schedule = dict(kind="cosine", warmup_steps=warmup_epochs * num_videos // batch_size, final_scale=0.01)
    config.train = dict(num_steps=num_epochs * num_videos // batch_size, batch_size=batch_size, log_every_steps=100)
    config.checkpoint = dict(every_steps=5000)
    config.eval = dict(batch_size=50)
    config.mesh = dict(fsdp=-1)
    config.model.update(dtype="bfloat16", remat="full")
    return config
